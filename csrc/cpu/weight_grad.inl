// The one-pass weight gradient: each sample's gradient is formed tile by tile in registers,
// then added to the running sum, its squares to the coordinate sums and its squared length to
// the sample's norm. It never reaches memory.
//
// Cost model. Forming the gradient takes T multiply-adds an element, as any weight gradient;
// the statistics add 2 vector operations an element and sample (3 with coordinates): 2/T of the
// work. For a chunk of samples whose operands fit in L2 the running sums of a tile stay in
// registers or L1 and go to memory once a chunk. A tile of MR members by NV vectors loads
// MR + NV operands for MR * NV multiply-adds.

#include "gram_sample.inl"
#include "transpose.inl"

// Registers for one sample's tile: 24 of 32 (AVX-512) or 12 of 16.
constexpr int kTileVectors = kVectorBytes == 64 ? 24 : 12;

template <class T>
struct Chunk {
  const T* wide;        // packed [panel][t][panel_width] of the first sample
  int64_t wide_stride;  // elements from sample to sample
  const T* narrow;      // packed image of the first sample
  int64_t narrow_stride;
  int64_t samples;
  bool first;  // of its range: the sums are written, not added to
};

template <class T, int MR, int NV, bool NORMS>
__attribute__((noinline)) void tile(const WeightGrad<T>& a, const Chunk<T>& chunk,
                                    const T* wide_panel, const int64_t* base, T* sum, T* sum_sq,
                                    T* norms) {
  constexpr int kWidth = NV * kLanes<T>;
  Vector<T> total[MR][NV] = {}, squares[MR][NV] = {}, acc[MR][NV] = {};
  for (int64_t s = 0; s < chunk.samples; ++s) {
    const T* wide = wide_panel + s * chunk.wide_stride;
    const T* narrow[MR];
    for (int m = 0; m < MR; ++m) narrow[m] = chunk.narrow + s * chunk.narrow_stride + base[m];
    if constexpr (NORMS) {
      for (int m = 0; m < MR; ++m) {
        for (int v = 0; v < NV; ++v) acc[m][v] = Vector<T>{};
      }
    }
    for (int64_t t = 0; t < a.positions; ++t) {
      const int64_t position = a.position[t];
      Vector<T> w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = load(wide + v * kLanes<T>);
#pragma GCC unroll 24
      for (int m = 0; m < MR; ++m) {
        const T x = narrow[m][position];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += x * w[v];
      }
      wide += kWidth;
    }
    if constexpr (!NORMS) continue;
    Vector<T> norm[4] = {};
#pragma GCC unroll 24
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Vector<T> square = acc[m][v] * acc[m][v];
        total[m][v] += acc[m][v];
        norm[(m * NV + v) % 4] += square;
        if (sum_sq) squares[m][v] += square;
      }
    }
    T* out = norms + s * kLanes<T>;
    store(out, load(out) + ((norm[0] + norm[1]) + (norm[2] + norm[3])));
  }
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) {
      T* out = sum + m * kWidth + v * kLanes<T>;
      const Vector<T> added = NORMS ? total[m][v] : acc[m][v];
      store(out, chunk.first ? added : load(out) + added);
      if (!sum_sq) continue;
      out = sum_sq + m * kWidth + v * kLanes<T>;
      store(out, chunk.first ? squares[m][v] : load(out) + squares[m][v]);
    }
  }
}

// tile<T, MR, NV> for a run-time number of members from 1 to MR.
template <class T, int MR, int NV>
ADAGRAD_KERNELS_INLINE void tile_of(int64_t members, const WeightGrad<T>& a, const Chunk<T>& chunk,
                                    const T* wide_panel, const int64_t* base, T* sum, T* sum_sq,
                                    T* norms) {
  if constexpr (MR > 1) {
    if (members < MR) {
      return tile_of<T, MR - 1, NV>(members, a, chunk, wide_panel, base, sum, sum_sq, norms);
    }
  }
  if (a.merged) {
    tile<T, MR, NV, false>(a, chunk, wide_panel, base, sum, sum_sq, norms);
  } else {
    tile<T, MR, NV, true>(a, chunk, wide_panel, base, sum, sum_sq, norms);
  }
}

// One panel of one sample to [t][panel_width], lanes beyond the last zero.
template <class T>
ADAGRAD_KERNELS_INLINE void pack_wide(const WeightGrad<T>& a, int64_t sample, int64_t panel,
                                      T* out) {
  const int64_t width = a.panel_width, first = panel * width;
  const int64_t lanes = a.lanes - first < width ? a.lanes - first : width;
  const int64_t positions = a.positions;
  const T* in = a.wide + sample * a.wide_sample + first * a.wide_lane;
  if (a.wide_lane == 1) {
    for (int64_t t = 0; t < positions; ++t) {
      __builtin_memcpy(out + t * width, in + t * a.wide_position, sizeof(T) * lanes);
    }
  } else if (a.wide_position == 1) {
    pack_transposed(in, a.wide_lane, positions, lanes, width, out);
  } else {
    for (int64_t t = 0; t < positions; ++t) {
      for (int64_t n = 0; n < lanes; ++n) {
        out[t * width + n] = in[t * a.wide_position + n * a.wide_lane];
      }
    }
  }
  if (lanes == width) return;
  for (int64_t t = 0; t < positions; ++t) {
    for (int64_t n = lanes; n < width; ++n) out[t * width + n] = 0;
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void pack_narrow(const WeightGrad<T>& a, int64_t sample, T* out) {
  for (int64_t i = 0; i < a.image(); ++i) out[i] = 0;
  for (int64_t line = 0; line < a.channels * a.frames; ++line) {
    const int64_t c = line / a.frames, f = line % a.frames;
    const T* frame =
        a.narrow + sample * a.narrow_sample + c * a.narrow_channel + f * a.narrow_frame;
    T* to = out + (c * a.depth + f + a.pad_front) * a.height * a.width;
    for (int64_t h = 0; h < a.rows; ++h) {
      const T* in = frame + h * a.narrow_row;
      T* row = to + (h + a.pad_top) * a.width + a.pad_left;
      if (a.narrow_column == 1) {
        __builtin_memcpy(row, in, sizeof(T) * a.columns);
      } else {
        for (int64_t w = 0; w < a.columns; ++w) row[w] = in[w * a.narrow_column];
      }
    }
  }
}

// Sums of one packed panel over t: one sample's bias gradient.
template <class T>
ADAGRAD_KERNELS_INLINE void add_wide_sum(const WeightGrad<T>& a, const T* packed, int64_t panel,
                                         double* norm) {
  const int64_t positions = a.positions;
  for (int64_t n = 0; n < a.panel_width; n += kLanes<T>) {
    Vector<T> part[4] = {};
    int64_t t = 0;
    for (; t + 4 <= positions; t += 4) {
      for (int i = 0; i < 4; ++i) part[i] += load(packed + (t + i) * a.panel_width + n);
    }
    for (; t < positions; ++t) part[0] += load(packed + t * a.panel_width + n);
    const Vector<T> sum = (part[0] + part[1]) + (part[2] + part[3]);
    T* out = a.wide_sum + panel * a.panel_width + n;
    store(out, load(out) + sum);
    *norm += sum_of_lanes<T>(sum * sum);
    if (!a.wide_sum_sq) continue;
    out = a.wide_sum_sq + panel * a.panel_width + n;
    store(out, load(out) + sum * sum);
  }
}

// A finished panel [members][panel_width] to rows of the weight: row = lane (convolution,
// transposed) or row = member (linear).
template <class T>
ADAGRAD_KERNELS_INLINE void unpack(const T* panel, int64_t members, int64_t panel_width,
                                   int64_t lanes, bool lanes_outer, int64_t out_stride, T* out) {
  if (lanes_outer) {
    pack_transposed(panel, panel_width, lanes, members, out_stride, out);
    return;
  }
  for (int64_t m = 0; m < members; ++m) {
    __builtin_memcpy(out + m * out_stride, panel + m * panel_width, sizeof(T) * lanes);
  }
}

template <class T, int NV>
ADAGRAD_KERNELS_INLINE void panel_of_tiles(const WeightGrad<T>& a, const Chunk<T>& chunk,
                                           const T* wide_panel, int64_t panel, T* norms) {
  constexpr int kMembers = kTileVectors / NV > 14 ? 14 : kTileVectors / NV;
  constexpr int kBlock = 8;  // tiles that leave the cache together, where no panel is kept
  constexpr int64_t kWidth = NV * kLanes<T>;
  alignas(64) T block[2][kBlock * kMembers * kWidth];
  // Equal tiles: 25 members are 13 + 12, not 14 + 11.
  const int64_t tiles = (a.members + kMembers - 1) / kMembers;
  const bool kept = a.sum != nullptr;
  int64_t first = 0;  // member of the block
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t m = a.members * i / tiles, end = a.members * (i + 1) / tiles;
    const int64_t offset = (panel * a.members + m) * kWidth, in_block = (m - first) * kWidth;
    T* sum = kept ? a.sum + offset : block[0] + in_block;
    T* sum_sq = kept ? (a.sum_sq ? a.sum_sq + offset : nullptr)
                     : (a.grad_sq ? block[1] + in_block : nullptr);
    tile_of<T, kMembers, NV>(end - m, a, chunk, wide_panel, a.base + m, sum, sum_sq, norms);
    if (kept || (i + 1 < tiles && (i + 1) % kBlock != 0)) continue;
    const int64_t lanes = a.lanes - panel * kWidth < kWidth ? a.lanes - panel * kWidth : kWidth;
    for (int k = 0; k < (a.grad_sq ? 2 : 1); ++k) {
      T* to = (k ? a.grad_sq : a.grad) +
              (a.lanes_outer ? panel * kWidth * a.row + first : first * a.row + panel * kWidth);
      unpack(block[k], end - first, kWidth, lanes, a.lanes_outer, a.row, to);
    }
    first = end;
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void range(const WeightGrad<T>& a, int64_t first, int64_t last,
                                  int64_t first_panel, int64_t last_panel) {
  constexpr int kNarrow = 64 / kVectorBytes;  // vectors in a panel of 64 bytes
  const int64_t positions = a.positions;
  const int64_t panel_size = positions * a.panel_width;
  const bool packs = a.images == nullptr && !a.packed();
  const T* images = a.images ? a.images : a.narrow;
  const int64_t from_image = a.packed() && !a.images ? a.narrow_sample : a.image_stride();
  T* wide = a.scratch;
  T* own = wide + a.chunk * (last_panel - first_panel) * panel_size;
  T* norms = own + (packs ? a.chunk * from_image : 0);
  for (int64_t s0 = first; s0 < last; s0 += a.chunk) {
    const int64_t samples = last - s0 < a.chunk ? last - s0 : a.chunk;
    const Chunk<T> chunk = {wide,
                            (last_panel - first_panel) * panel_size,
                            packs ? own : images + s0 * from_image,
                            from_image,
                            samples,
                            s0 == first};
    for (int64_t s = 0; s < samples; ++s) {
      store(norms + s * kLanes<T>, Vector<T>{});
      if (packs) pack_narrow(a, s0 + s, own + s * from_image);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        T* out = wide + s * chunk.wide_stride + (panel - first_panel) * panel_size;
        pack_wide(a, s0 + s, panel, out);
        if (a.wide_sum) add_wide_sum(a, out, panel, &a.norms[s0 + s]);
      }
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const T* wide_panel = wide + (panel - first_panel) * panel_size;
      if (a.panel_width == kNarrow * kLanes<T>) {
        panel_of_tiles<T, kNarrow>(a, chunk, wide_panel, panel, norms);
      } else {
        panel_of_tiles<T, 2 * kNarrow>(a, chunk, wide_panel, panel, norms);
      }
    }
    for (int64_t s = 0; s < samples; ++s) {
      a.norms[s0 + s] += sum_of_lanes<T>(load(norms + s * kLanes<T>));
    }
  }
}

// Squared norms of samples [first, last) by products of positions (gram_sample.inl), instead of
// those that the tiles find. Rows u: the lanes of a position; rows v: its members.
template <class T>
ADAGRAD_KERNELS_INLINE void gram_range(const WeightGrad<T>& a, int64_t first, int64_t last) {
  const int64_t positions = a.positions, width = a.panel_width;
  const int64_t panels = (a.lanes + width - 1) / width, lanes = panels * width;
  T* packed = a.scratch;
  T* own = packed + positions * width;
  const bool packs = a.images == nullptr && !a.packed();
  T* u = own + (packs ? a.image() : 0);
  T* v = u + positions * lanes;
  for (int64_t s = first; s < last; ++s) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      pack_wide(a, s, panel, packed);
      for (int64_t t = 0; t < positions; ++t) {
        __builtin_memcpy(u + t * lanes + panel * width, packed + t * width, sizeof(T) * width);
      }
    }
    if (packs) pack_narrow(a, s, own);
    const T* given = a.images ? a.images + s * a.image_stride() : a.narrow + s * a.narrow_sample;
    const T* image = packs ? own : given;
    for (int64_t t = 0; t < positions; ++t) {
      const T* at = image + a.position[t];
      for (int64_t m = 0; m < a.members; ++m) v[t * a.members + m] = at[a.base[m]];
    }
    a.norms[s] += gram_sample(u, lanes, v, a.members, positions);
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                             \
  void weight_grad_range(const WeightGrad<T>& a, int64_t first, int64_t last, int64_t first_panel, \
                         int64_t last_panel) {                                                     \
    range<T>(a, first, last, first_panel, last_panel);                                             \
  }                                                                                                \
  void pack_images_range(const WeightGrad<T>& a, int64_t first, int64_t last, T* images) {         \
    for (int64_t s = first; s < last; ++s) pack_narrow(a, s, images + s * a.image_stride());       \
  }                                                                                                \
  void gram_norms_range(const WeightGrad<T>& a, int64_t first, int64_t last) {                     \
    gram_range<T>(a, first, last);                                                                 \
  }                                                                                                \
  void unpack_panel(const T* panel, int64_t members, int64_t panel_width, int64_t lanes,           \
                    bool lanes_outer, int64_t out_stride, T* out) {                                \
    unpack<T>(panel, members, panel_width, lanes, lanes_outer, out_stride, out);                   \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
