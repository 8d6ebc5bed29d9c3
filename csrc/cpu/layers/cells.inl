// What a product's sum runs over: cells of 32 bits. Part of kernels.inl.
//
// In the float32 kernels a cell is a float. In the bf16 kernels (T2T_FAST_PAIRS) it is two consecutive terms of the
// sum, rounded to bfloat16, the first one in the lower half; products add both of them to a float32. So both kinds of
// kernels are the same source, and the same packed layout serves AVX512_BF16 and the tiles of AMX.

#if defined(T2T_FAST_PAIRS)

using Cell = uint32_t;
constexpr int64_t TERMS = 2;  // in a cell

typedef uint32_t CellVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UnalignedCellVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline CellVec load(const Cell* from) { return *reinterpret_cast<const UnalignedCellVec*>(from); }
inline void store(Cell* to, CellVec x) { *reinterpret_cast<UnalignedCellVec*>(to) = x; }

// The bits of a bfloat16, nearest even, in the upper half; the lower half is undefined.
template <typename Bits>
inline Bits rounded(Bits bits) {
  const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const Bits nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return nan ? bits | 0x00400000u : nearest;
}

inline Cell cell_of(float low, float high) {
  return rounded(bits_of(low)) >> 16 | (rounded(bits_of(high)) & 0xffff0000u);
}

#if defined(T2T_FAST_BF16_UNIT)
// 32 numbers as 32 bfloat16, those of `low` first.
inline CellVec narrowed(Vec low, Vec high) { return (CellVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// One cell of each lane: its number in `low` and its number in `high`.
inline CellVec paired(Vec low, Vec high) {
  const __m512i order =
      _mm512_add_epi32(_mm512_set1_epi32(16 << 16),
                       _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(0x10001)));
  return (CellVec)_mm512_permutexvar_epi16(order, (__m512i)narrowed(low, high));
}

inline Vec multiply_add(Cell a, CellVec b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a - CellVec{}), (__m512bh)b);
}
#else
inline CellVec paired(Vec low, Vec high) {
  return rounded((CellVec)low) >> 16 | (rounded((CellVec)high) & 0xffff0000u);
}

inline CellVec narrowed(Vec low, Vec high) {
  CellVec cells;
  for (int64_t i = 0; i < LANES / 2; ++i) {
    cells[i] = cell_of(low[2 * i], low[2 * i + 1]);
    cells[i + LANES / 2] = cell_of(high[2 * i], high[2 * i + 1]);
  }
  return cells;
}

inline Vec multiply_add(Cell a, CellVec b, Vec sum) {
  sum += float_from_bits(a << 16) * (Vec)(b << 16);
  return sum + float_from_bits(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
}
#endif

// LANES cells: of consecutive terms, and of the terms at `from` and `next` behind it.
inline CellVec consecutive(const float* from) { return narrowed(load(from), load(from + LANES)); }
inline CellVec successive(const float* from, int64_t next) { return paired(load(from), load(from + next)); }
inline CellVec only(Vec last) { return paired(last, Vec{}); }

// x as a term of a sum.
inline Vec term_of(Vec x) { return (Vec)(rounded((CellVec)x) & 0xffff0000u); }

// The sum of a register of cells' terms, lane by lane.
inline Vec term_sum(CellVec cell) { return (Vec)(cell << 16) + (Vec)(cell & 0xffff0000u); }

#else

using Cell = float;
using CellVec = Vec;
constexpr int64_t TERMS = 1;

inline Cell cell_of(float term, float) { return term; }
inline CellVec consecutive(const float* from) { return load(from); }
inline CellVec successive(const float* from, int64_t) { return load(from); }
inline CellVec only(Vec last) { return last; }
inline Vec term_of(Vec x) { return x; }
inline Vec term_sum(CellVec cell) { return cell; }
inline Vec multiply_add(Cell a, CellVec b, Vec sum) { return sum + a * b; }

#endif

#if defined(T2T_FAST_TILES)
constexpr int64_t STEPS = 16;  // a sum has a multiple of so many cells, filled with zeros
#else
constexpr int64_t STEPS = 1;
#endif

// Cells of a sum of `terms`.
inline int64_t cells(int64_t terms) { return (terms + TERMS * STEPS - 1) / (TERMS * STEPS) * STEPS; }

// Scratch memory of cells; a whole register may be read or written at any of them.
using Cells = Buffer<Cell, LANES>;
