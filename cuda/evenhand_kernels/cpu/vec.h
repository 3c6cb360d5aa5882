// Vectors of floats in GCC's and Clang's portable vector syntax; the compiler maps them to AVX2, AVX-512 or NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats in a vector
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Word __attribute__((aligned(1), may_alias));
typedef uint32_t UnsignedVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int16_t ShortVec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t UnsignedByteVec __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(LANES), aligned(1), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
#if defined(__aarch64__)
typedef __fp16 NativeHalf;  // GCC 12 knows _Float16 for x86 alone
#else
typedef _Float16 NativeHalf;
#endif
// Two inputs of a product, the first in the lower half: one operand lane of vdpbf16ps.
struct BFloat16Pair {
  uint32_t bits;
};

static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec splat(BFloat16Pair x) { return (Vec)(static_cast<int32_t>(x.bits) - IntVec{}); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
static inline void store(BFloat16Pair* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

#if defined(__AVX512F__)
static inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
static inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// The bits of LANES numbers of 16 bits, each in the lower half of a lane.
template <typename T>
static inline IntVec halves(const T* p) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));  // GCC 12 would do it in two parts
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), IntVec);
#endif
}

static inline Vec load(const BFloat16* p) { return (Vec)(halves(p) << 16); }

static inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec result;
  for (int i = 0; i < LANES; i++) {
    NativeHalf value;
    std::memcpy(&value, p + i, 2);
    result[i] = value;
  }
  return result;
#endif
}

static inline Vec widened(ByteVec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)v)));
#else
  return __builtin_convertvector(v, Vec);
#endif
}

static inline Vec load(const BFloat16Pair* p) { return *reinterpret_cast<const Vec*>(p); }

// The upper 16 bits of each lane, rounded to nearest even. Numbers that are not finite stay so.
static inline UnsignedVec rounded(Vec v) {
  const UnsignedVec bits = (UnsignedVec)v, nan = UnsignedVec{} + 0x7fc0;
  return v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : nan;
}

static inline void narrow(Vec v, BFloat16* to) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  *reinterpret_cast<HalfVec*>(to) = __builtin_convertvector(rounded(v), HalfVec);
#endif
}

// Pairs of the lanes of two vectors, rounded as above.
static inline Vec pairs(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  static constexpr uint16_t ORDER[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec)_mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), halves);
#else
  return (Vec)(rounded(first) | rounded(second) << 16);
#endif
}

// total + left * right, of pairs the sum of both products.
template <typename T>
static inline Vec multiply_add(Vec total, Vec left, Vec right, const T*) {
  return total + left * right;
}

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIR_PRODUCTS = true;
#else
constexpr bool HAS_PAIR_PRODUCTS = false;
#endif

static inline Vec multiply_add(Vec total, Vec left, Vec right, const BFloat16Pair*) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)right);
#else
  const IntVec upper = IntVec{} + static_cast<int>(0xffff0000), a = (IntVec)left, b = (IntVec)right;
  return total + (Vec)(a << 16) * (Vec)(b << 16) + (Vec)(a & upper) * (Vec)(b & upper);
#endif
}

// Whether `dot` is an instruction.
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool HAS_CODE_PRODUCTS = true;
#else
constexpr bool HAS_CODE_PRODUCTS = false;
#endif

// total + the sum, in each lane, of the products of four unsigned and four signed bytes.
static inline IntVec dot(IntVec total, IntVec unsigned_bytes, IntVec bytes) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)unsigned_bytes, (__m512i)bytes);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)unsigned_bytes, (__m256i)bytes);
#else
  for (int shift = 0; shift < 32; shift += 8) total += (unsigned_bytes >> shift & 255) * (bytes << (24 - shift) >> 24);
  return total;
#endif
}

// Products of vectors of 16 or 8 bits, added in pairs (vpmaddwd, vpmaddubsw).
#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(__AVX512BW__)
#define EVENHAND_SHORT_PRODUCTS
constexpr bool HAS_SHORT_PRODUCTS = true;
#else
constexpr bool HAS_SHORT_PRODUCTS = false;
#endif

#if defined(EVENHAND_SHORT_PRODUCTS) && defined(__AVX512F__)
static inline IntVec add_products_of_shorts(IntVec a, IntVec b) { return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
static inline IntVec add_products_of_bytes(IntVec a, IntVec b) { return (IntVec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
static inline IntVec add_shorts(IntVec a, IntVec b) { return (IntVec)_mm512_add_epi16((__m512i)a, (__m512i)b); }
// Two rows of 2 * LANES bytes as pairs in 16 bits: those of the first half, and of the second.
static inline void interleave(const char* rows, IntVec& low, IntVec& high) {
  const ByteVec* bytes = reinterpret_cast<const ByteVec*>(rows);
  const auto pairs = [](ByteVec first, ByteVec second) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepi8_epi32((__m128i)second), 16);
    return (IntVec)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtepi8_epi32((__m128i)first), upper);
  };
  low = pairs(bytes[0], bytes[2]), high = pairs(bytes[1], bytes[3]);
}
#elif defined(EVENHAND_SHORT_PRODUCTS)
static inline IntVec add_products_of_shorts(IntVec a, IntVec b) { return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
static inline IntVec add_products_of_bytes(IntVec a, IntVec b) { return (IntVec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
static inline IntVec add_shorts(IntVec a, IntVec b) { return (IntVec)_mm256_add_epi16((__m256i)a, (__m256i)b); }
static inline void interleave(const char* rows, IntVec& low, IntVec& high) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(rows);
  const __m128i first = _mm_loadu_si128(bytes), second = _mm_loadu_si128(bytes + 1);
  low = (IntVec)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
  high = (IntVec)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second));
}
#endif

#if defined(EVENHAND_SHORT_PRODUCTS)
// total + the sum, in each lane, of the products of two numbers of 16 bits.
static inline IntVec add_products_of_shorts(IntVec total, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (IntVec)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
  return total + add_products_of_shorts(a, b);
#endif
}
#endif

#if defined(__AVX512F__)
static inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float largest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
// All lanes combined, in pairs of pairs.
template <typename Combine>
static inline float reduced(Vec v, const Combine& combine) {
#pragma GCC unroll 3
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] = combine(v[i], v[i + half]);
  return v[0];
}

static inline float sum(Vec v) { return reduced(v, [](float a, float b) { return a + b; }); }
static inline float largest(Vec v) { return reduced(v, [](float a, float b) { return a > b ? a : b; }); }
#endif

// Whether a comparison holds in any lane.
static inline bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int result = 0;
  for (int i = 0; i < LANES; i++) result |= mask[i];
  return result != 0;
#endif
}

// Narrowing, round to nearest even. Numbers that are not finite stay so.
static inline void narrow(float x, float* to) { *to = x; }

static inline void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

static inline float through_bfloat16(float x) {
  BFloat16 narrowed;
  narrow(x, &narrowed);
  const uint32_t bits = static_cast<uint32_t>(narrowed.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

static inline void narrow(float x, Float16* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const NativeHalf value = x;
  std::memcpy(to, &value, 2);
#endif
}

template <typename T>
static inline void narrow(const float* from, long size, T* to) {
  long i = 0;
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; i + LANES <= size; i += LANES) narrow(load(from + i), to + i);
  for (; i < size; i++) narrow(from[i], to + i);
}

// The nearest whole numbers, ties to even, of numbers or vectors below 2^22.
template <typename T>
static inline T nearest(T x) { return (x + 12582912.0f) - 12582912.0f; }

// exp(x) with a relative error below 2e-7 in [-87, 88], and the value at the nearer end beyond: never 0, never infinite.
// x = n ln 2 + r; e^r by a polynomial (Cephes expf).
static inline Vec exp(Vec x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  const Vec n = nearest(x * 1.44269504f);
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23);
#endif
}
