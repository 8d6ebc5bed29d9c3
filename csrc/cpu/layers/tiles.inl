// The tiles of AMX: eight registers of 16 rows of 16 cells. Part of kernels.inl, for the instruction set amx.
//
// With T2T_FAST_EMULATE_TILES they are plain memory, so that tests and sanitizers run the same kernels on every CPU.

#if defined(T2T_FAST_EMULATE_TILES)

struct Tiles {
  Cell cells[8][16][16];

  static Tiles& of_thread() {
    static thread_local Tiles tiles;
    return tiles;
  }
};

inline void tile_zero(int n) { std::memset(Tiles::of_thread().cells[n], 0, sizeof(Tiles::cells[n])); }

inline void tile_load(int n, const void* from, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r)
    std::memcpy(Tiles::of_thread().cells[n][r], static_cast<const char*>(from) + r * stride, 64);
}

inline void tile_store(int n, void* to, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, Tiles::of_thread().cells[n][r], 64);
}

inline void tile_multiply_add(int sum, int a, int b) {
  Tiles& tiles = Tiles::of_thread();
  for (int64_t r = 0; r < 16; ++r) {
    Vec total = (Vec)load(tiles.cells[sum][r]);
    for (int64_t step = 0; step < 16; ++step)
      total = multiply_add(tiles.cells[a][r][step], load(tiles.cells[b][step]), total);
    store(tiles.cells[sum][r], (CellVec)total);
  }
}

#define T2T_FAST_TILE_ZERO(n) tile_zero(n)
#define T2T_FAST_TILE_LOAD(n, from, stride) tile_load(n, from, stride)
#define T2T_FAST_TILE_STORE(n, to, stride) tile_store(n, to, stride)
#define T2T_FAST_TILE_MULTIPLY_ADD(sum, a, b) tile_multiply_add(sum, a, b)

struct TilesInUse {};

#else

// Instructions by name: the compiler needs no support for AMX, and "memory" keeps its stores in order.
#define T2T_FAST_TILE_ZERO(n) __asm__ volatile("tilezero %%tmm" #n::: "memory")
#define T2T_FAST_TILE_LOAD(n, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n::"r"(from), "r"(stride) : "memory")
#define T2T_FAST_TILE_STORE(n, to, stride) \
  __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define T2T_FAST_TILE_MULTIPLY_ADD(sum, a, b) \
  __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::: "memory")

// Every tile with all its rows, as long as this object lives: other libraries use the tiles of a thread too.
struct TilesInUse {
  TilesInUse() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  ~TilesInUse() { __asm__ volatile("tilerelease" ::: "memory"); }
  TilesInUse(const TilesInUse&) = delete;
};

#endif
