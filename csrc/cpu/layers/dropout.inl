// Counter-based dropout masks, bit for bit those of t2t_fast/ops/philox.py (which says how elements, calls and lanes
// are numbered, and how the two dropouts of a layer share a lane). Part of kernels.inl.

typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint64_t LongVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t LaneVec __attribute__((vector_size(LANES * 2)));
typedef uint16_t UnalignedLaneVec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// High and low words of the products of 32-bit words with a constant: even words, then odd ones, as 64-bit products.
inline void multiply(WordVec x, uint64_t constant, WordVec& high, WordVec& low) {
  const LongVec word = LongVec{} + 0xFFFFFFFFull;
  const LongVec even = ((LongVec)x & word) * constant, odd = ((LongVec)x >> 32) * constant;
  low = (WordVec)((even & word) | (odd << 32));
  high = (WordVec)((even >> 32) | (odd & ~word));
}

class Dropout {
 public:
  Dropout(double proj_drop, double mlp_drop, uint64_t seed)
      : active_(proj_drop > 0 || mlp_drop > 0), seed_(seed),
        first_end_(static_cast<int32_t>(std::nearbyint(65536 * proj_drop))),
        length_(static_cast<int32_t>(std::nearbyint(65536 * mlp_drop))),
        second_begin_(first_end_ - static_cast<int32_t>(std::nearbyint(first_end_ * (length_ / 65536.0)))),
        proj_scale_(static_cast<float>(1 / (1 - proj_drop))), mlp_scale_(static_cast<float>(1 / (1 - mlp_drop))) {}

  bool active() const { return active_; }

  // uint16 values that draw() needs for `count` elements.
  static int64_t room(int64_t count) { return count + 8 * LANES + 16; }

  // The lanes of elements [first, first + count); returns where the first one lies in the buffer.
  const uint16_t* draw(int64_t first, int64_t count, uint16_t* buffer) const {
    const int64_t call_begin = first / 8, call_end = (first + count + 7) / 8;
    uint32_t* words = reinterpret_cast<uint32_t*>(buffer);
    for (int64_t call = call_begin; call < call_end; call += LANES, words += 4 * LANES) draw_calls(call, words);
    return buffer + first % 8;
  }

  // x, a register of a row's projection (or MLP output) whose lanes begin at `lanes`, after dropout. By products, as
  // PyTorch's: what is not finite stays so.
  Vec proj(Vec x, const uint16_t* lanes) const {
    const IntVec u = widen(lanes);
    return x * (u < first_end_ ? Vec{} : splat(proj_scale_));
  }

  Vec mlp(Vec x, const uint16_t* lanes) const {
    const IntVec u = widen(lanes) - second_begin_;
    return x * ((u >= 0) & (u < length_) ? Vec{} : splat(mlp_scale_));
  }

 private:
  static IntVec widen(const uint16_t* lanes) {
    return __builtin_convertvector((LaneVec) * reinterpret_cast<const UnalignedLaneVec*>(lanes), IntVec);
  }

  void draw_calls(int64_t call, uint32_t* words) const {
    uint32_t low[LANES], high[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      low[i] = static_cast<uint32_t>(call + i);
      high[i] = static_cast<uint32_t>(static_cast<uint64_t>(call + i) >> 32);
    }
    WordVec c[4] = {};
    std::memcpy(&c[0], low, sizeof(low));
    std::memcpy(&c[1], high, sizeof(high));
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 7; ++round) {
      WordVec high0, low0, high1, low1;
      multiply(c[0], 0xD2511F53u, high0, low0);
      multiply(c[2], 0xCD9E8D57u, high1, low1);
      c[0] = high1 ^ c[1] ^ k0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ k1;
      c[3] = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int64_t i = 0; i < LANES; ++i)
      for (int64_t word = 0; word < 4; ++word) words[4 * i + word] = c[word][i];
  }

  bool active_;
  uint64_t seed_;
  int32_t first_end_, length_, second_begin_;  // in 1/65536: the first drops [0, first_end), see philox.py
  float proj_scale_, mlp_scale_;
};
