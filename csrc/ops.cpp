// START HERE: every op of calm_rt, its schema and the function that each device runs. No logic.
//
// From here down: ops/<op>.h checks and allocates, kernels/<op>.h is the border (formula and struct),
// kernels/{cpu,cuda}/ do the work.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"
#include "common/isa.h"
#include "ops/decode.h"
#include "ops/encode.h"
#include "ops/energy_score.h"
#include "ops/gated_mlp.h"
#include "ops/linear_argmax.h"
#include "ops/linear_cross_entropy.h"
#include "ops/noise.h"
#include "ops/sample_latents.h"
#include "ops/sample_latents_backward.h"
#include "ops/select_patch.h"
#include "ops/survivors.h"

namespace calm_rt {

std::string build_info() {
  const std::string argmax = argmax_by_library() ? "library" : "own";
  return std::string(kBuildInfo) + "isa=" + isa_name(isa()) + "\nproducts=" + products_name(products()) +
         "\ncuda_argmax=" + argmax + "\n";
}

bool has_cuda() {
#ifdef CALM_RT_CUDA
  return &aoti_torch_get_current_cuda_stream != nullptr;
#else
  return false;
#endif
}

}  // namespace calm_rt

STABLE_TORCH_LIBRARY(calm_rt, m) {
  m.def("build_info() -> str");
  m.def("has_cuda() -> bool");
  m.def(
      "noise(Tensor seed, Tensor rows, int num_draws, int length, int stream, bool normal, bool double_precision) -> "
      "Tensor");
  m.def(
      "decode(Tensor latents, Tensor latent, Tensor latent_bias, Tensor[] patch_layers, Tensor expand, Tensor "
      "expand_bias, Tensor[] token_layers, Tensor norm, Tensor vocabulary, Tensor? screen, float eps) -> Tensor");
  m.def(
      "encode(Tensor ids, Tensor tables, Tensor[] token_layers, Tensor? squeeze, Tensor? squeeze_bias, Tensor[] "
      "patch_layers, Tensor norm, Tensor latent, Tensor latent_bias, float eps) -> (Tensor mean, Tensor log_std)");
  m.def(
      "energy_score(Tensor x, Tensor mean, Tensor log_std, Tensor seed, Tensor rows, int num_targets, float beta, "
      "bool need_grad_x, bool need_grad_target) -> (Tensor score, Tensor diversity, Tensor fidelity, Tensor grad_x, "
      "Tensor grad_mean, Tensor grad_log_std)");
  m.def(
      "gated_mlp(Tensor x, Tensor norm_weight, Tensor gate, Tensor up, Tensor down, float eps, bool keep_products) -> "
      "(Tensor out, Tensor gate_product, Tensor up_product)");
  m.def(
      "gated_mlp_backward(Tensor grad_out, Tensor grad_product, Tensor x, Tensor norm_weight, Tensor gate, Tensor up, "
      "Tensor down, Tensor gate_product, Tensor up_product, float eps, bool need_grad_matrices) -> (Tensor grad_x, "
      "Tensor grad_norm_weight, Tensor grad_gate, Tensor grad_up, Tensor grad_down)");
  m.def("linear_argmax(Tensor hidden, Tensor weight, Tensor? screen, Tensor? count=None) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? scale, int ignore_index, "
      "int max_workspace_bytes, bool need_grad_hidden, bool need_grad_weight, bool keep_grad_logits) -> (Tensor total, "
      "Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_logits)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_logits, Tensor hidden, Tensor weight, bool need_grad_hidden, bool "
      "need_grad_weight) -> (Tensor grad_hidden, Tensor grad_weight)");
  m.def(
      "sample_latents(Tensor hidden, Tensor[] weights, Tensor seed, Tensor rows, int num_samples, float eps, bool "
      "keep) "
      "-> (Tensor latents, Tensor products, Tensor stream, Tensor contexts)");
  m.def(
      "sample_latents_backward(Tensor grad_latents, Tensor hidden, Tensor[] weights, Tensor seed, Tensor rows, Tensor "
      "products, Tensor stream, Tensor contexts, float eps, bool need_grad_weights) -> (Tensor grad_hidden, Tensor[] "
      "grad_weights)");
  m.def("screen_vocabulary(Tensor weight) -> Tensor");
  m.def("select_patch(Tensor tokens, Tensor seed, Tensor rows, int n) -> Tensor");
  m.def("survivors(Tensor tokens, Tensor kept, int depth) -> (Tensor order, Tensor count)");
}

STABLE_TORCH_LIBRARY_IMPL(calm_rt, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&calm_rt::build_info));
  m.impl("has_cuda", TORCH_BOX(&calm_rt::has_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(calm_rt, CPU, m) {
  m.impl("noise", TORCH_BOX(&calm_rt::noise<calm_rt::Cpu>));
  m.impl("decode", TORCH_BOX(&calm_rt::decode<calm_rt::Cpu>));
  m.impl("encode", TORCH_BOX(&calm_rt::encode<calm_rt::Cpu>));
  m.impl("energy_score", TORCH_BOX(&calm_rt::energy_score<calm_rt::Cpu>));
  m.impl("gated_mlp", TORCH_BOX(&calm_rt::gated_mlp<calm_rt::Cpu>));
  m.impl("gated_mlp_backward", TORCH_BOX(&calm_rt::gated_mlp_backward<calm_rt::Cpu>));
  m.impl("linear_argmax", TORCH_BOX(&calm_rt::linear_argmax<calm_rt::Cpu>));
  m.impl("linear_cross_entropy", TORCH_BOX(&calm_rt::linear_cross_entropy<calm_rt::Cpu>));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&calm_rt::linear_cross_entropy_backward<calm_rt::Cpu>));
  m.impl("sample_latents", TORCH_BOX(&calm_rt::sample_latents<calm_rt::Cpu>));
  m.impl("sample_latents_backward", TORCH_BOX(&calm_rt::sample_latents_backward<calm_rt::Cpu>));
  m.impl("screen_vocabulary", TORCH_BOX(&calm_rt::screen_vocabulary));
  m.impl("select_patch", TORCH_BOX(&calm_rt::select_patch<calm_rt::Cpu>));
  m.impl("survivors", TORCH_BOX(&calm_rt::survivors<calm_rt::Cpu>));
}

#ifdef CALM_RT_CUDA
STABLE_TORCH_LIBRARY_IMPL(calm_rt, CUDA, m) {
  m.impl("noise", TORCH_BOX(&calm_rt::noise<calm_rt::Cuda>));
  m.impl("decode", TORCH_BOX(&calm_rt::decode<calm_rt::Cuda>));
  m.impl("encode", TORCH_BOX(&calm_rt::encode<calm_rt::Cuda>));
  m.impl("energy_score", TORCH_BOX(&calm_rt::energy_score<calm_rt::Cuda>));
  m.impl("gated_mlp", TORCH_BOX(&calm_rt::gated_mlp<calm_rt::Cuda>));
  m.impl("gated_mlp_backward", TORCH_BOX(&calm_rt::gated_mlp_backward<calm_rt::Cuda>));
  m.impl("linear_argmax", TORCH_BOX(&calm_rt::linear_argmax<calm_rt::Cuda>));
  m.impl("linear_cross_entropy", TORCH_BOX(&calm_rt::linear_cross_entropy<calm_rt::Cuda>));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&calm_rt::linear_cross_entropy_backward<calm_rt::Cuda>));
  m.impl("sample_latents", TORCH_BOX(&calm_rt::sample_latents<calm_rt::Cuda>));
  m.impl("sample_latents_backward", TORCH_BOX(&calm_rt::sample_latents_backward<calm_rt::Cuda>));
  m.impl("select_patch", TORCH_BOX(&calm_rt::select_patch<calm_rt::Cuda>));
  m.impl("survivors", TORCH_BOX(&calm_rt::survivors<calm_rt::Cuda>));
}
#endif

// The ops register themselves when this library is loaded; Python only needs something to import.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
