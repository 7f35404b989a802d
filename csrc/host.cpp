// Python module calm_rt._host: host-side loops over numpy buffers. No torch. calm_rt/host.py says the same in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "common/philox.h"

namespace py = pybind11;

namespace calm_rt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// counters: [N, 4] -> [N, 4], Philox4x32-10 of each under the key `seed`.
Array<uint32_t> philox4x32(const Array<uint32_t>& counters, uint64_t seed) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) throw std::invalid_argument("counters: expected shape [N, 4]");
  Array<uint32_t> words({counters.shape(0), py::ssize_t{4}});
  const uint32_t* counter = counters.data();
  uint32_t* word = words.mutable_data();
  for (py::ssize_t n = 0; n < counters.shape(0); ++n, counter += 4, word += 4) {
    PhiloxWords result = philox({{counter[0], counter[1], counter[2], counter[3]}}, seed);
    std::copy_n(result.word, 4, word);
  }
  return words;
}

// Of each document heads[d] times start_id, its lengths[d] tokens, EOS, then PAD up to a multiple of patch_size. The
// caller sizes `packed`.
template <class T>
void pack_documents(const Array<int32_t>& tokens, const Array<int64_t>& lengths, const Array<int64_t>& heads,
                    T start_id, T eos_id, T pad_id, int64_t patch_size, Array<T> packed) {
  if (heads.size() != lengths.size()) throw std::invalid_argument("heads: expected one for each of lengths");
  if (patch_size < 1) throw std::invalid_argument("patch_size: expected at least 1");
  const int32_t* token = tokens.data();
  T* out = packed.mutable_data();
  T* const begin = out;
  int64_t left = tokens.size();
  for (py::ssize_t d = 0; d < lengths.size(); ++d) {
    int64_t length = lengths.data()[d];
    int64_t head = heads.data()[d];
    int64_t room = packed.size() - (out - begin);
    if (length < 0 || length > left || head < 0 || head > room) {
      throw std::invalid_argument("lengths: do not fit tokens and packed");
    }
    int64_t size = (head + length + patch_size) / patch_size * patch_size;  // whole patches, EOS included
    if (size > room) throw std::invalid_argument("lengths: do not fit tokens and packed");
    T* const end = out + size;
    out = std::fill_n(out, head, start_id);
    out = std::transform(token, token + length, out, [](int32_t id) { return static_cast<T>(id); });
    *out++ = eos_id;
    out = std::fill_n(out, end - out, pad_id);
    token += length;
    left -= length;
  }
}

}  // namespace
}  // namespace calm_rt

PYBIND11_MODULE(_host, module) {
  module.def("philox4x32", &calm_rt::philox4x32, py::arg("counters").noconvert(), py::arg("seed"));
  module.def("pack_documents", &calm_rt::pack_documents<uint16_t>, py::arg("tokens").noconvert(),
             py::arg("lengths").noconvert(), py::arg("heads").noconvert(), py::arg("start_id"), py::arg("eos_id"),
             py::arg("pad_id"), py::arg("patch_size"), py::arg("packed").noconvert());
  module.def("pack_documents", &calm_rt::pack_documents<uint32_t>, py::arg("tokens").noconvert(),
             py::arg("lengths").noconvert(), py::arg("heads").noconvert(), py::arg("start_id"), py::arg("eos_id"),
             py::arg("pad_id"), py::arg("patch_size"), py::arg("packed").noconvert());
}
