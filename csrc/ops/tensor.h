// The one place where torch's stable ABI meets the kernels: checks, devices, dispatch over element types.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

#include "common/device.h"
#include "common/types.h"

// Absent from a CPU-only torch; found through libtorch.so in a CUDA torch. So one binary serves both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace calm_rt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stable ABI's typed pointers know torch's own 16-bit types, ours have the same bits.
template <class T>
struct TorchType {
  using type = T;
};
template <>
struct TorchType<bfloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct TorchType<half> {
  using type = torch::headeronly::Half;
};

template <class T>
const T* input(const Tensor& tensor) {
  return reinterpret_cast<const T*>(tensor.const_data_ptr<typename TorchType<T>::type>());
}

// nullptr for an empty tensor, which stands for an output that nobody asked for.
template <class T>
T* output(const Tensor& tensor) {
  if (tensor.numel() == 0) return nullptr;
  return reinterpret_cast<T*>(tensor.mutable_data_ptr<typename TorchType<T>::type>());
}

// An uninitialised contiguous tensor on the device of `like`, and of its type unless another is given. The stable ABI
// reaches new_empty by its name, at a microsecond or two a call; this asks directly.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> type = {}) {
  constexpr size_t kMaxDimensions = 3;
  STD_TORCH_CHECK(sizes.size() <= kMaxDimensions, "allocate: at most ", kMaxDimensions, " dimensions");
  std::array<int64_t, kMaxDimensions> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device_type = 0, dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type,
                                              like.get_device_index(), &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "allocate: not enough memory for a tensor of ", stride, " numbers");
  return Tensor(handle);
}

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_shape(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  if (tensor.scalar_type() != type || tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin());
}

// Calls body with a value of the kernel's element type.
template <class Device, class Body>
void dispatch(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(half{});
    default:
      break;
  }
  if constexpr (std::is_same_v<Device, Cpu>) {
    if (type == ScalarType::Double) return body(double{});
  }
  STD_TORCH_CHECK(false, op, ": no kernel for this dtype");
}

inline void parallel_for(int64_t count, int64_t grain, Cpu::Body body, const void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// The tensors of one call, which must share a device: a kernel that was handed another's memory would read garbage or
// end the process.
class Operands {
 public:
  explicit Operands(const Tensor& first) : place_(place(first)) {}

  const Tensor& checked(const Tensor& tensor) const {
    STD_TORCH_CHECK(place(tensor) == place_, "calm_rt: all tensors of a call must be on one device");
    return tensor;
  }

  Tensor contiguous(const Tensor& tensor) const {
    return checked(tensor).is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }

  // The same of what goes into the library's products: on a GPU their bits depend on alignment too, so a view that
  // begins beside a whole pack is copied.
  Tensor factor(const Tensor& tensor) const {
    constexpr uintptr_t kPackBytes = 16;
    const Tensor dense = contiguous(tensor);
    const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kPackBytes == 0;
    return aligned || place_.first != aoti_torch_device_type_cuda() ? dense : torch::stable::clone(dense);
  }

 private:
  static std::pair<int32_t, int32_t> place(const Tensor& tensor) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return {type, tensor.get_device_index()};
  }

  std::pair<int32_t, int32_t> place_;
};

// Makes the tensor's device current for as long as it lives and knows what a launch needs.
template <class Device>
struct Guard;

template <>
struct Guard<Cpu> : Operands {
  using Operands::Operands;
  Cpu device() const { return {parallel_for}; }
};

#ifdef CALM_RT_SIMULATOR
template <>
struct Guard<Cuda> : Operands {  // the simulator runs CUDA kernels on CPU tensors, in order
  using Operands::Operands;
  Cuda device() const { return {nullptr}; }
};
#else
template <>
struct Guard<Cuda> : Operands {
  explicit Guard(const Tensor& tensor) : Operands(tensor), index(tensor.get_device_index()), guard(index) {}
  Cuda device() const {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream, "calm_rt: this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return {static_cast<cudaStream_t>(stream)};
  }
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

}  // namespace calm_rt
