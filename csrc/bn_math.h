// Merging of channel statistics, and the affine of a BatchNorm: plain arithmetic, callable on host and device.
//
// Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#pragma once

#include <cmath>

#include "data_type.h"

namespace fused_resnet {

// Count, mean and M2 = sum (x - mean)^2 of a set of values; an empty set is (0, 0, 0).
struct Statistics {
  double count;
  double mean;
  double m2;
};

// Statistics of the union of two sets. E[x^2] - E[x]^2 would cancel where the mean is large against the deviation.
FUSED_RESNET_HD Statistics merge(Statistics a, Statistics b) {
  const double count = a.count + b.count;
  if (count == 0.0) return {0.0, 0.0, 0.0};
  const double delta = b.mean - a.mean;
  const double weight = b.count / count;
  return {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * a.count * weight};
}

// new = old + weight * (value - old), the running average of a statistic.
FUSED_RESNET_HD double running(double old_value, double value, double weight) {
  return old_value + weight * (value - old_value);
}

// M2 / (n - 1); for a single value M2 itself, which is 0.
FUSED_RESNET_HD double unbiased_variance(Statistics s) { return s.m2 / (s.count > 1.0 ? s.count - 1.0 : 1.0); }

// A BatchNorm with running statistics, vectors [channels]; gamma and beta null: 1 and 0.
struct FrozenBatchNorm {
  const float *mean, *var, *gamma, *beta;
  double eps;
};

// value * scale + shift is what a BatchNorm makes of a channel.
struct Affine {
  float scale, shift;
};

FUSED_RESNET_HD Affine affine_of(const FrozenBatchNorm& bn, int channel) {
  const float gamma = bn.gamma == nullptr ? 1.0f : bn.gamma[channel];
  const float beta = bn.beta == nullptr ? 0.0f : bn.beta[channel];
  const float scale = gamma / sqrtf(bn.var[channel] + static_cast<float>(bn.eps));
  return {scale, beta - bn.mean[channel] * scale};
}

}  // namespace fused_resnet
