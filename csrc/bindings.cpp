// Operators of the CUDA library on LibTorch's stable ABI: checks, device guard, stream. No mathematics.
//
// Outputs are allocated by the caller, which knows their memory format. Every check names the argument, what came and
// what is allowed, before anything is launched.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bn.h"
#include "bottleneck_sm90.h"
#include "conv3x3_sm90.h"
#include "conv3x3_wgrad_sm90.h"

namespace {

using fused_resnet::DataType;
using fused_resnet::Epilogue;
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

// [N, C, H, W] = `shape` in dense channels_last memory, dtype and device of `like`; the stride of an extent of 1 does
// not matter.
void check_rows(const char* name, const Tensor& t, const std::array<int64_t, 4>& shape, const Tensor& like) {
  check_cuda(name, t, like);
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t dense[4] = {h * w * c, 1, w * c, c};
  bool ok = true;
  for (int64_t i = 0; i < 4; ++i) {
    ok = ok && (t.size(i) == 1 || t.numel() == 0 || t.stride(i) == dense[i]) && t.size(i) == shape[i];
  }
  STD_TORCH_CHECK(ok, name, ": expected [", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3],
                  "] in dense channels_last memory, got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of the first tensor");
}

void check_rows(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(like.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(like));
  check_rows(name, t, {like.size(0), like.size(1), like.size(2), like.size(3)}, like);
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

void bn_frozen(Tensor running_mean, Tensor running_var, std::optional<Tensor> gamma, std::optional<Tensor> beta,
               double eps, Tensor bn) {
  STD_TORCH_CHECK(running_mean.dim() == 1, "running_mean: expected [C], got ", shape_of(running_mean));
  const int64_t channels = running_mean.size(0);
  check_vector("running_mean", running_mean, ScalarType::Float, {channels}, running_mean);
  check_vector("running_var", running_var, ScalarType::Float, {channels}, running_mean);
  if (gamma.has_value()) check_vector("gamma", *gamma, ScalarType::Float, {channels}, running_mean);
  if (beta.has_value()) check_vector("beta", *beta, ScalarType::Float, {channels}, running_mean);
  check_vector("bn", bn, ScalarType::Float, {5, channels}, running_mean);
  const torch::stable::accelerator::DeviceGuard guard(running_mean.get_device_index());
  fused_resnet::launch_bn_frozen(
      {{data<float>(running_mean), data<float>(running_var), data<float>(gamma), data<float>(beta), eps},
       data<float>(bn),
       channels},
      stream_of(running_mean));
  check_launch("bn_frozen");
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

using Vectors = std::vector<std::optional<Tensor>>;

// The BatchNorm of a convolution's output, from `vectors[first ...]` = mean, var, gamma or null, beta or null.
fused_resnet::FrozenBatchNorm frozen(const std::string& name, const Vectors& vectors, size_t first, double eps,
                                     int64_t channels, const Tensor& like) {
  const char* fields[] = {".mean", ".var", ".gamma", ".beta"};
  for (size_t i = 0; i < 4; ++i) {
    const std::string field = name + fields[i];
    STD_TORCH_CHECK(i >= 2 || vectors[first + i].has_value(), field, ": expected a tensor, got None");
    if (vectors[first + i].has_value()) {
      check_vector(field.c_str(), *vectors[first + i], ScalarType::Float, {channels}, like);
    }
  }
  return {data<float>(vectors[first]), data<float>(vectors[first + 1]), data<float>(vectors[first + 2]),
          data<float>(vectors[first + 3]), eps};
}

// What every kernel written for sm_90a needs of its first tensor; its data type.
DataType check_sm90(const char* name, const Tensor& x) {
  check_rows(name, x, x);
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index());
  STD_TORCH_CHECK(major == 9 && minor == 0, name, ": on an sm_", major, minor, " device, the kernel needs sm_90");
  STD_TORCH_CHECK(x.size(0) * x.size(2) * x.size(3) < (int64_t{1} << 31) - 256, name, ": pixel indices are 32-bit");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, name,
                  ": expected float16 or bfloat16, got another dtype");
  return type == ScalarType::Half ? DataType::kFloat16 : DataType::kBFloat16;
}

// A contiguous matrix or weight of the dtype of x.
void check_weight(const char* name, const Tensor& w, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_vector(name, w, w.scalar_type(), shape, x);
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
}

void check_channels(const char* name, int64_t channels) {
  STD_TORCH_CHECK(channels > 0 && channels % 64 == 0, name, ": expected a multiple of 64 channels, got ", channels);
}

fused_resnet::Conv3x3Shape conv3x3_shape(const Tensor& x, int64_t filters, int64_t stride) {
  const auto size = [&x](int i) { return static_cast<int>(x.size(i)); };
  return {size(0), size(2), size(3), size(1), static_cast<int>(filters), static_cast<int>(stride)};
}

// Checks x [N, C, H, W], w [K, 3, 3, C] and out [N, K, P, Q]; what the three kinds of launches have in common.
fused_resnet::Conv3x3Launch conv3x3(const Tensor& x, const Tensor& w, int64_t stride, const Tensor& out) {
  const DataType dtype = check_sm90("x", x);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  STD_TORCH_CHECK(w.dim() == 4, "w: expected [K, 3, 3, C], got ", shape_of(w));
  const int64_t channels = x.size(1), filters = w.size(0);
  check_weight("w", w, {filters, 3, 3, channels}, x);
  check_channels("x", channels);
  check_channels("out", filters);
  check_rows("out", out, {x.size(0), filters, (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1}, x);
  fused_resnet::Conv3x3Launch launch{};
  launch.shape = conv3x3_shape(x, filters, stride);
  launch.dtype = dtype;
  launch.x = x.data_ptr();
  launch.w = w.data_ptr();
  launch.out = out.data_ptr();
  return launch;
}

void run_conv3x3(const char* name, const fused_resnet::Conv3x3Launch& launch, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fused_resnet::launch_conv3x3_sm90(launch, stream_of(x));
  check_launch(name);
}

void conv3x3_stats_sm90(Tensor x, Tensor w, int64_t stride, Tensor out, Tensor partials) {
  fused_resnet::Conv3x3Launch launch = conv3x3(x, w, stride, out);
  STD_TORCH_CHECK(partials.dim() == 3 && partials.size(0) > 0, "partials: expected [T, 3, K], got ",
                  shape_of(partials));
  check_vector("partials", partials, ScalarType::Float, {partials.size(0), 3, w.size(0)}, x);
  launch.epilogue = Epilogue::kStatistics;
  launch.partials = static_cast<float*>(partials.data_ptr());
  launch.partial_rows = static_cast<int>(partials.size(0));
  run_conv3x3("conv3x3_stats_sm90", launch, x);
}

void conv3x3_affine_sm90(Tensor x, Tensor w, Vectors bn, double eps, std::optional<Tensor> residual,
                         std::optional<Tensor> mask, bool relu, int64_t stride, Tensor out) {
  fused_resnet::Conv3x3Launch launch = conv3x3(x, w, stride, out);
  const int64_t filters = w.size(0);
  STD_TORCH_CHECK(bn.empty() || bn.size() == 4, "bn: expected mean, var, gamma and beta, or nothing, got ", bn.size(),
                  " tensors");
  if (residual.has_value()) check_rows("residual", *residual, out);
  if (mask.has_value()) {
    STD_TORCH_CHECK(residual.has_value(), "mask: expected with a residual");
    check_vector("mask", *mask, ScalarType::Byte, {out.size(0), out.size(2), out.size(3), filters / 8}, x);
  }
  launch.epilogue = Epilogue::kAffine;
  if (!bn.empty()) launch.frozen = frozen("bn", bn, 0, eps, filters, x);
  launch.side = residual.has_value() ? residual->data_ptr() : nullptr;
  launch.mask = data<uint8_t>(mask);
  launch.relu = relu;
  run_conv3x3("conv3x3_affine_sm90", launch, x);
}

void conv3x3_relu_grad_sm90(Tensor g, Tensor w, Tensor relu_c, Tensor relu_bn, Tensor dx, Tensor sums) {
  fused_resnet::Conv3x3Launch launch = conv3x3(g, w, 1, dx);
  check_rows("relu_c", relu_c, dx);
  check_vector("relu_bn", relu_bn, ScalarType::Float, {5, w.size(0)}, g);
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) > 0, "sums: expected [T, 2, C], got ", shape_of(sums));
  check_vector("sums", sums, ScalarType::Float, {sums.size(0), 2, w.size(0)}, g);
  launch.epilogue = Epilogue::kReluGradient;
  launch.bn = static_cast<float*>(relu_bn.data_ptr());
  launch.side = relu_c.data_ptr();
  launch.partials = static_cast<float*>(sums.data_ptr());
  launch.partial_rows = static_cast<int>(sums.size(0));
  run_conv3x3("conv3x3_relu_grad_sm90", launch, g);
}

void conv3x3_wgrad_sm90(Tensor x, Tensor g, int64_t stride, Tensor parts, Tensor dw) {
  const DataType dtype = check_sm90("x", x);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  STD_TORCH_CHECK(g.dim() == 4, "g: expected [N, K, P, Q], got ", shape_of(g));
  const int64_t channels = x.size(1), filters = g.size(1);
  check_rows("g", g, {x.size(0), filters, (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1}, x);
  check_channels("x", channels);
  check_channels("g", filters);
  check_vector("dw", dw, ScalarType::Float, {filters, 3, 3, channels}, x);
  const int64_t step = fused_resnet::wgrad_parts_per_chunk(static_cast<int>(filters));
  STD_TORCH_CHECK(parts.dim() == 5 && parts.size(0) > 0 && parts.size(0) % step == 0,
                  "parts: expected [T, K, 3, 3, C] with T a multiple of ", step, ", got ", shape_of(parts));
  check_vector("parts", parts, ScalarType::Float, {parts.size(0), filters, 3, 3, channels}, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fused_resnet::launch_conv3x3_wgrad_sm90(
      {conv3x3_shape(x, filters, stride), dtype, x.data_ptr(), g.data_ptr(), static_cast<float*>(parts.data_ptr()),
       static_cast<float*>(dw.data_ptr()), static_cast<int>(parts.size(0))},
      stream_of(x));
  check_launch("conv3x3_wgrad_sm90");
}

void bottleneck_affine_sm90(Tensor x, std::vector<Tensor> weights, Vectors bns, std::vector<double> eps, Tensor out) {
  constexpr int64_t kWidth = fused_resnet::kWidth, kWide = fused_resnet::kWide;
  const DataType dtype = check_sm90("x", x);
  const size_t count = weights.size();
  STD_TORCH_CHECK(count == 3 || count == 4, "weights: expected 3, or 4 with a projection, got ", count);
  STD_TORCH_CHECK(bns.size() == 4 * count && eps.size() == count, "bns: expected mean, var, gamma, beta and eps of ",
                  count, " weights, got ", bns.size(), " tensors and ", eps.size(), " numbers");
  const bool projection = count == 4;
  const int64_t channels = fused_resnet::bottleneck_channels(projection);
  check_rows("x", x, {x.size(0), channels, x.size(2), x.size(3)}, x);
  check_weight("weights[0]", weights[0], {kWidth, channels}, x);
  check_weight("weights[1]", weights[1], {kWidth, 3, 3, kWidth}, x);
  check_weight("weights[2]", weights[2], {kWide, kWidth}, x);
  if (projection) check_weight("weights[3]", weights[3], {kWide, kWidth}, x);
  check_rows("out", out, {x.size(0), kWide, x.size(2), x.size(3)}, x);
  const auto size = [&x](int i) { return static_cast<int>(x.size(i)); };
  const auto bn = [&](size_t i) {
    return frozen("bns[" + std::to_string(i) + "]", bns, 4 * i, eps[i], weights[i].size(0), x);
  };
  fused_resnet::BottleneckLaunch launch{};
  launch.shape = {size(0), size(2), size(3)};
  launch.dtype = dtype;
  launch.x = x.data_ptr();
  launch.w1 = weights[0].data_ptr();
  launch.w2 = weights[1].data_ptr();
  launch.w3 = weights[2].data_ptr();
  launch.w_shortcut = projection ? weights[3].data_ptr() : nullptr;
  launch.bn1 = bn(0);
  launch.bn2 = bn(1);
  launch.bn3 = bn(2);
  if (projection) launch.bn_shortcut = bn(3);
  launch.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fused_resnet::launch_bottleneck_sm90(launch, stream_of(x));
  check_launch("bottleneck_affine_sm90");
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_resnet_cuda, m) {
  m.def(
      "bn_finalize(Tensor partials, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float momentum, float eps, Tensor(d!) bn) -> ()");
  m.def(
      "bn_frozen(Tensor running_mean, Tensor running_var, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) bn) "
      "-> ()");
  m.def("bn_join(Tensor c, Tensor bn, Tensor shortcut, Tensor? bn_shortcut, Tensor(a!) out, Tensor(b!) mask) -> ()");
  m.def("conv3x3_stats_sm90(Tensor x, Tensor w, int stride, Tensor(a!) out, Tensor(b!) partials) -> ()");
  m.def(
      "conv3x3_affine_sm90(Tensor x, Tensor w, Tensor?[] bn, float eps, Tensor? residual, Tensor? mask, bool relu, "
      "int stride, Tensor(a!) out) -> ()");
  m.def(
      "conv3x3_relu_grad_sm90(Tensor g, Tensor w, Tensor relu_c, Tensor relu_bn, Tensor(a!) dx, Tensor(b!) sums) "
      "-> ()");
  m.def("conv3x3_wgrad_sm90(Tensor x, Tensor g, int stride, Tensor(a!) parts, Tensor(b!) dw) -> ()");
  m.def("bottleneck_affine_sm90(Tensor x, Tensor[] weights, Tensor?[] bns, float[] eps, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CompositeExplicitAutograd, m) {
  m.impl("bn_finalize", TORCH_BOX(&bn_finalize));
  m.impl("bn_frozen", TORCH_BOX(&bn_frozen));
  m.impl("bn_join", TORCH_BOX(&bn_join));
  m.impl("conv3x3_stats_sm90", TORCH_BOX(&conv3x3_stats_sm90));
  m.impl("conv3x3_affine_sm90", TORCH_BOX(&conv3x3_affine_sm90));
  m.impl("conv3x3_relu_grad_sm90", TORCH_BOX(&conv3x3_relu_grad_sm90));
  m.impl("conv3x3_wgrad_sm90", TORCH_BOX(&conv3x3_wgrad_sm90));
  m.impl("bottleneck_affine_sm90", TORCH_BOX(&bottleneck_affine_sm90));
}
