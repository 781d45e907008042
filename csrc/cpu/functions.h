// Elementary functions on vectors, accurate to float32's own rounding. Knows `vf`; does not know tensors.
// Included after vec_avx512.h or vec_avx2.h.
#pragma once

namespace miss {
namespace {

// e ** x, to 1.5 units in the last place, subnormal results included; 0 at -infinity and below -104; infinity above
// 88.73; NaN at NaN.
// Cephes' reduction and polynomial.
inline vf exp(vf x) {
  vf bounded = min(set1(90.0f), max(set1(-105.0f), x));  // the operands' order hands NaN on
  vf n = round(mul(bounded, set1(1.44269504088896341f)));
  vf r = fnma(n, set1(0.693359375f), bounded);
  r = fnma(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return times_power_of_two(p, n);  // p * power_of_two(n) would be infinity from 88.38 on
}

// The normal distribution function, to 1.1e-7: 1/2 + x * R(x^2), the polynomial R fitted on |x| <= 5.5 (beyond it the
// function is 0 or 1 to float32) for the least greatest error of x * Phi(x), which is 6e-7 (PyTorch's own: 4.5e-7).
inline vf normal_cdf(vf x) {
  vf bounded = min(set1(5.5f), max(set1(-5.5f), x));
  vf t = fma(mul(bounded, bounded), set1(2.0f / 30.25f), set1(-1.0f));
  constexpr float R[16] = {
      1.285519302e-01f, -6.417234987e-02f, 4.773747548e-02f, -3.879237548e-02f, 3.207315877e-02f, -2.605402283e-02f,
      2.034419402e-02f, -1.496468671e-02f, 1.029486861e-02f, -6.922107190e-03f, 4.510111175e-03f, -2.259867033e-03f,
      8.112418582e-04f, -6.523555494e-04f, 6.026397459e-04f, -1.987726428e-04f};
  vf r = set1(R[15]);
#pragma GCC unroll 16
  for (int i = 14; i >= 0; --i) r = fma(r, t, set1(R[i]));
  return fma(bounded, r, set1(0.5f));
}

// x * Phi(x), to 6.1e-7 or float32's own rounding, whichever is more; NaN at NaN, infinity at infinity, within 6.1e-7 of
// 0 at -infinity (PyTorch's is NaN). Below -5.5 the error of Phi, 2.6e-8, would count |x| times.
inline vf gelu(vf x) { return mul(max(set1(-5.5f), x), normal_cdf(x)); }

// The same where the result becomes 8-bit codes: |x| * 5.3e-5 from gelu, half of the terms. A code's step is 1/127 of the
// row's largest, so that 0.05 % of the codes change, by one.
inline vf gelu_for_codes(vf x) {
  vf least = max(set1(-4.0f), x), bounded = min(set1(4.0f), least);
  vf t = fma(mul(bounded, bounded), set1(2.0f / 16.0f), set1(-1.0f));
  constexpr float R[8] = {1.759429286e-01f, -8.434351701e-02f, 5.618932876e-02f, -3.671123302e-02f,
                          2.108514064e-02f, -1.256049809e-02f, 8.699781907e-03f, -3.315143361e-03f};
  vf r = set1(R[7]);
#pragma GCC unroll 8
  for (int i = 6; i >= 0; --i) r = fma(r, t, set1(R[i]));
  return mul(least, fma(bounded, r, set1(0.5f)));
}

// The derivative of gelu, Phi(x) + x * phi(x), to 2e-7; NaN at NaN and, as PyTorch's, at both infinities.
inline vf gelu_slope(vf x) {
  vf density = mul(set1(0.3989422804014327f), exp(mul(mul(x, x), set1(-0.5f))));
  return fma(x, density, normal_cdf(x));
}

}  // namespace
}  // namespace miss
