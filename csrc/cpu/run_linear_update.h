// The update inside a linear layer's weight gradient over threads.
#pragma once

#include "layer_ops.h"
#include "reductions.h"

namespace adagrad_kernels {

// Every task has a run of rows. A run reads all of the packed input once for each of its blocks of
// tiles: blocks are small while that stays in L2, so that few rows of memory are open at a time,
// and larger beyond.
template <class T>
AdagradReductions run_linear_update(const LinearUpdate<T>& a) {
  constexpr int64_t kL2 = 768 << 10;
  const Outer<T>& p = a.product;
  const OuterTiles tiles = outer_tiles(p);
  const int64_t packed_input = tiles.panels * p.samples * tiles.width;
  const int64_t block = packed_input * static_cast<int64_t>(sizeof(T)) <= kL2 ? 1 : 8;
  const int64_t tasks = ceil_div(tiles.row_tiles, block);
  Scratch<T> grad_out(tiles.packed * tiles.row_tiles * p.samples), input(packed_input);
  std::vector<AdagradReductions> parts(tasks);
  const auto pack_grad_out = [&](int64_t begin, int64_t end) {
    outer_pack_range(p, begin, end, grad_out.get());
  };
  const auto pack_input = [&](int64_t begin, int64_t end) {
    linear_update_pack_range(p, begin, end, input.get());
  };
  const auto update = [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(kTileScratch * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * block, last = std::min(first + block, tiles.row_tiles);
      parts[task] = linear_update_range(a, grad_out.get(), input.get(), first, last, scratch.get());
    }
  };
  if (p.samples * p.rows * p.columns < 65536) {  // starting the other threads would cost more
    pack_grad_out(0, tiles.row_tiles);
    pack_input(0, tiles.panels);
    update(0, tasks);
  } else {
    parallel_for(0, tiles.row_tiles, 1, pack_grad_out);
    parallel_for(0, tiles.panels, 1, pack_input);
    parallel_for(0, tasks, 1, update);
  }
  AdagradReductions total;
  for (const AdagradReductions& part : parts) add(total, part);
  return total;
}

}  // namespace adagrad_kernels
