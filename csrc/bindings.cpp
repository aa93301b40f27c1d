// Operators of the CUDA library on LibTorch's stable ABI: checks, device guard, stream. No mathematics.
//
// Outputs are allocated by the caller, which knows their memory format. Every check names the argument, what came and
// what is allowed, before anything is launched.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "bn.h"

namespace {

using fused_resnet::DataType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void check_cuda(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name, ": on device ", t.get_device_index(),
                  ", expected ", like.get_device_index());
}

void check_vector(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                  const Tensor& like) {
  check_cuda(name, t, like);
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  std::string expected = "[";
  for (const int64_t extent : shape) {
    expected += (i ? ", " : "") + std::to_string(extent);
    same = same && t.size(i++) == extent;
  }
  STD_TORCH_CHECK(same && t.is_contiguous(), name, ": expected contiguous ", expected, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ",
                  dtype == ScalarType::Float ? "float32" : (dtype == ScalarType::Long ? "int64" : "uint8"),
                  ", got another dtype");
}

// [N, C, H, W] in dense channels_last memory; the stride of an extent of 1 does not matter.
void check_rows(const char* name, const Tensor& t, const Tensor& like) {
  check_cuda(name, t, like);
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t dense[4] = {h * w * c, 1, w * c, c};
  bool ok = true;
  for (int64_t i = 0; i < 4; ++i) {
    ok = ok && (t.size(i) == 1 || t.numel() == 0 || t.stride(i) == dense[i]) && t.size(i) == like.size(i);
  }
  STD_TORCH_CHECK(ok, name, ": expected ", shape_of(like), " in dense channels_last memory, got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of c");
}

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void bn_finalize(Tensor partials, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                 std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                 std::optional<Tensor> num_batches_tracked, double momentum, double eps, Tensor bn) {
  STD_TORCH_CHECK(partials.dim() == 3 && partials.size(1) == 3, "partials: expected [T, 3, C], got ",
                  shape_of(partials));
  const int64_t rows = partials.size(0), channels = partials.size(2);
  check_vector("partials", partials, ScalarType::Float, {rows, 3, channels}, partials);
  check_vector("bn", bn, ScalarType::Float, {5, channels}, partials);
  const std::optional<Tensor>* vectors[] = {&gamma, &beta, &running_mean, &running_var};
  const char* names[] = {"gamma", "beta", "running_mean", "running_var"};
  for (int i = 0; i < 4; ++i) {
    if (vectors[i]->has_value()) check_vector(names[i], **vectors[i], ScalarType::Float, {channels}, partials);
  }
  if (num_batches_tracked.has_value()) {
    check_vector("num_batches_tracked", *num_batches_tracked, ScalarType::Long, {}, partials);
  }
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_var: expected with running_mean");
  const bool cumulative = momentum < 0;
  STD_TORCH_CHECK(!cumulative || !running_mean.has_value() || num_batches_tracked.has_value(),
                  "num_batches_tracked: needed for a cumulative average (momentum < 0)");
  const torch::stable::accelerator::DeviceGuard guard(partials.get_device_index());
  fused_resnet::launch_bn_finalize(
      {data<float>(partials), data<float>(gamma), data<float>(beta), data<float>(running_mean),
       data<float>(running_var), data<int64_t>(num_batches_tracked), data<float>(bn), rows, channels, momentum, eps,
       cumulative},
      stream_of(partials));
  check_launch("bn_finalize");
}

void bn_join(Tensor c, Tensor bn, Tensor shortcut, std::optional<Tensor> bn_shortcut, Tensor out, Tensor mask) {
  check_rows("c", c, c);
  const int64_t channels = c.size(1);
  check_vector("bn", bn, ScalarType::Float, {5, channels}, c);
  check_rows("shortcut", shortcut, c);
  if (bn_shortcut.has_value()) check_vector("bn_shortcut", *bn_shortcut, ScalarType::Float, {5, channels}, c);
  check_rows("out", out, c);
  check_vector("mask", mask, ScalarType::Byte, {c.size(0), c.size(2), c.size(3), (channels + 7) / 8}, c);
  DataType dtype = DataType::kFloat32;
  switch (c.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::Half:
      dtype = DataType::kFloat16;
      break;
    case ScalarType::BFloat16:
      dtype = DataType::kBFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, "c: expected float32, float16 or bfloat16, got another dtype");
  }
  const torch::stable::accelerator::DeviceGuard guard(c.get_device_index());
  fused_resnet::launch_bn_join(
      {c.data_ptr(), data<float>(bn), shortcut.data_ptr(), data<float>(bn_shortcut), out.data_ptr(),
       data<uint8_t>(mask), c.size(0) * c.size(2) * c.size(3), channels, dtype},
      stream_of(c));
  check_launch("bn_join");
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_resnet_cuda, m) {
  m.def(
      "bn_finalize(Tensor partials, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float momentum, float eps, Tensor(d!) bn) -> ()");
  m.def("bn_join(Tensor c, Tensor bn, Tensor shortcut, Tensor? bn_shortcut, Tensor(a!) out, Tensor(b!) mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CompositeExplicitAutograd, m) {
  m.impl("bn_finalize", TORCH_BOX(&bn_finalize));
  m.impl("bn_join", TORCH_BOX(&bn_join));
}
