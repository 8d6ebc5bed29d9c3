// A register of floats as the compiler's vector type, so that one source serves every instruction set.
// Part of kernels.inl.

constexpr int64_t LANES = T2T_FAST_LANES;  // floats in a register

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<UnalignedVec*>(to) = x; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a < b ? b : a; }  // of a NaN in a and a number: the NaN

// x with the lanes whose numbers differ in the bit DISTANCE exchanged.
template <int64_t DISTANCE, typename Register>
inline Register exchanged(Register x) {
#if defined(__clang__)
  Register y;
  for (int64_t i = 0; i < LANES; ++i) y[i] = x[i ^ DISTANCE];
  return y;
#else
  IntVec from;
  for (int64_t i = 0; i < LANES; ++i) from[i] = static_cast<int32_t>(i ^ DISTANCE);
  return __builtin_shuffle(x, from);
#endif
}

// Transposes a square of LANES registers, exchanging blocks of 1, 2, 4 ... lanes between pairs of registers.
template <int64_t DISTANCE = 1, typename Register>
inline void transpose(Register (&x)[LANES]) {
  if constexpr (DISTANCE < LANES) {
    IntVec upper;
    for (int64_t lane = 0; lane < LANES; ++lane) upper[lane] = lane & DISTANCE ? -1 : 0;
    for (int64_t i = 0; i < LANES; ++i) {
      if (i & DISTANCE) continue;
      const Register a = x[i], b = x[i | DISTANCE];
      x[i] = upper ? exchanged<DISTANCE>(b) : a;
      x[i | DISTANCE] = upper ? b : exchanged<DISTANCE>(a);
    }
    transpose<2 * DISTANCE>(x);
  }
}

// The sum and the largest of all lanes, as a tree.
template <int64_t DISTANCE = LANES / 2>
inline float sum(Vec x) {
  if constexpr (DISTANCE == 0) {
    return x[0];
  } else {
    return sum<DISTANCE / 2>(x + exchanged<DISTANCE>(x));
  }
}

template <int64_t DISTANCE = LANES / 2>
inline float largest(Vec x) {
  if constexpr (DISTANCE == 0) {
    return x[0];
  } else {
    return largest<DISTANCE / 2>(larger(x, exchanged<DISTANCE>(x)));
  }
}

// Rows of a tile are padded to whole registers, so loops over a row have no remainder.
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// exp(x) as 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (a minimax fit, relative error 3e-9 before rounding).
// 0 below -87.33 (no denormal result), infinity above 88.72, NaN for NaN.
inline Vec exponential(Vec x) {
  const Vec low = splat(-87.33654f), high = splat(88.72283f);
  const IntVec vanishes = x<low, overflows = x> high;
  x = vanishes ? low : x;
  x = overflows ? high : x;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec rounded = x * 1.44269504088896341f + shift;
  const Vec n = rounded - shift;
  Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in 9 bits
  r = r + n * 2.12194440e-4f;
  Vec q = splat(1.3814466273893728e-3f);
  q = q * r + 8.368780474662475e-3f;
  q = q * r + 4.166839422721616e-2f;
  q = q * r + 1.6666520107135613e-1f;
  q = q * r + 4.999999341242052e-1f;
  q = q * (r * r) + r + 1.0f;
  const IntVec exponent = (IntVec)rounded - (IntVec)shift;
  const IntVec half = exponent >> 1;  // 2^n in two factors, because n reaches 128
  q = q * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
  q = vanishes ? Vec{} : q;
  return overflows ? splat(INFINITY) : q;
}

// Phi(h) of the normal distribution and exp(-h^2 / 2), which GELU h Phi(h) and its derivative are made of.
// Phi(-|h|) = exp(-h^2 / 2) erfcx(|h| / sqrt 2) / 2, erfcx by a polynomial in t = 1 / (1 + 0.33 z) (a minimax fit,
// relative error 8e-8, so the far tail keeps its digits).
struct Normal {
  Vec phi, bell;
};

inline Normal normal(Vec h) {
  const Vec size = h < 0 ? -h : h;
  const Vec bell = exponential(h * h * -0.5f);
  const Vec t = 1.0f / (size * (0.33f * 0.70710678118654752f) + 1.0f);
  Vec p = splat(-0.13592877294313568f);
  p = p * t + 0.46268810392991244f;
  p = p * t - 0.3554386795800602f;
  p = p * t + 0.4125413242983791f;
  p = p * t + 0.04501081473759244f;
  p = p * t + 0.20192376710703508f;
  p = p * t + 0.18283725157901087f;
  p = p * t + 0.18636610920832133f;
  const Vec tail = p * t * bell * 0.5f;
  return {h < 0 ? tail : 1.0f - tail, bell};
}
