"""Writes docs/ops.md from the docstrings of calm_rt.ops: `make docs`."""

import inspect
from pathlib import Path

from calm_rt import ops

HEAD = """# Ops

Made from the docstrings by `make docs`. Every op is a function of tensors: `calm_rt.ops.NAME`.
Where a kernel for the device and dtype exists it runs, elsewhere `calm_rt.reference`;
`calm_rt.backend` chooses. S are draws, R rows, L numbers of a latent vector, H features, V entries
of the vocabulary, K tokens of a patch. `rows` names rows for the random numbers, `seed` is an int
or a tensor (under `torch.compile` and in CUDA graphs). A bad argument is a ValueError that names
it.
"""


def page() -> str:
    """The text of docs/ops.md."""
    parts = [HEAD]
    for name in ops.__all__:
        function = getattr(ops, name)
        signature = str(inspect.signature(function)).replace("torch.Tensor", "Tensor")
        kinds = ", ".join(
            f"{device}: {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
            for device, dtypes in inspect.getmodule(function).DTYPES.items()
        )
        text = inspect.cleandoc(function.__doc__)
        parts.append(
            f"## {name}\n\n```text\n{name}{signature}\n\n{text}\n```\nKernels for {kinds}.\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("ops.md").write_text(page())
