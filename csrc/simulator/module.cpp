// torch.ops.calm_rt_simulator: the CUDA kernels in the simulator, through the ops' own code, on CPU tensors.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops/energy_score.h"
#include "ops/noise.h"
#include "simulator/simulator.h"

namespace calm_rt {

// Which order of threads and blocks the following launches take; 0 is first come, first served.
void set_schedule(int64_t seed) { simulator::set_schedule(static_cast<uint32_t>(seed)); }

}  // namespace calm_rt

STABLE_TORCH_LIBRARY(calm_rt_simulator, m) {
  m.def("set_schedule(int seed) -> ()");
  m.def(
      "noise(Tensor seed, Tensor rows, int num_draws, int length, int stream, bool normal, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "energy_score(Tensor x, Tensor mean, Tensor log_std, Tensor seed, Tensor rows, int num_targets, float beta, "
      "bool need_grad_x, bool need_grad_target) -> (Tensor score, Tensor diversity, Tensor fidelity, Tensor grad_x, "
      "Tensor grad_mean, Tensor grad_log_std)");
}

STABLE_TORCH_LIBRARY_IMPL(calm_rt_simulator, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&calm_rt::set_schedule));
}

STABLE_TORCH_LIBRARY_IMPL(calm_rt_simulator, CPU, m) {
  m.impl("noise", TORCH_BOX(&calm_rt::noise<calm_rt::Cuda>));
  m.impl("energy_score", TORCH_BOX(&calm_rt::energy_score<calm_rt::Cuda>));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__simulator() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_simulator", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
