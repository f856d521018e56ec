// The one-pass weight gradient over threads: who computes what, and how the parts are joined.
#pragma once

#include "layer_ops.h"

namespace adagrad_kernels {

// How weight_grad_range's work is split: every task has a run of samples and a run of panels of
// one group. Large weights split the panels, so that no second copy of the sums is needed; small
// ones split the samples, each part with sums of its own.
struct Split {
  int64_t groups, sample_parts, panel_parts, panels, panel_elements;
  int64_t tasks() const { return groups * sample_parts * panel_parts; }
  int64_t sums() const { return groups * panels * panel_elements; }  // of one sample part
};

template <class T>
Split split_work(const WeightGrad<T>& a, int64_t groups, int64_t samples) {
  constexpr int64_t kWork = 1 << 20;    // multiply-adds of a task
  constexpr int64_t kCopies = 1 << 20;  // elements of all copies of the sums
  Split s;
  s.groups = groups;
  s.panels = ceil_div(a.lanes, a.panel_width);
  s.panel_elements = a.members * a.panel_width;
  const int64_t work = samples * a.positions * s.sums();
  const int64_t wanted = std::clamp<int64_t>(work / kWork, 1, ceil_div(kTasks, groups));
  const bool large = s.panels * s.panel_elements >= (1 << 17);
  s.panel_parts = large ? std::min(wanted, s.panels) : 1;
  // A copy of the sums is filled and added once: little against 16 positions or more.
  const int64_t copies = std::min({wanted / s.panel_parts, samples, samples * a.positions / 16,
                                   kCopies / std::max<int64_t>(s.sums(), 1)});
  s.sample_parts = std::max<int64_t>(copies, 1);
  if (!large) s.panel_parts = std::clamp<int64_t>(wanted / s.sample_parts, 1, s.panels);
  return s;
}

// Samples packed at a time. A chunk whose operands stay in L2 is read from there by every panel,
// but the sums come from memory once a chunk: where they are large and samples few, a chunk of
// many samples, whose images every panel reads from beyond L2, moves less. At most kChunk, since
// a chunk is summed by itself and errors stay small that way.
template <class T>
int64_t chunk_of(const WeightGrad<T>& a, int64_t sample_size, int64_t samples, int64_t panels,
                 bool coordinates) {
  constexpr int64_t kL2 = 384 << 10, kChunk = 64;
  const int64_t small = std::clamp<int64_t>(kL2 / (sample_size * sizeof(T)), 1, kChunk);
  const int64_t sums = 2 * panels * a.members * a.panel_width * (coordinates ? 2 : 1);
  const int64_t images = samples * panels * a.image();
  const auto moved = [&](int64_t chunk) { return ceil_div(samples, chunk) * sums; };
  return moved(small) > moved(kChunk) + images ? kChunk : small;
}

// Where the panels are split, every task needs the padded images: they are packed once, unless
// they take too much memory (elements).
constexpr int64_t kSharedImages = 1 << 22;

// lanes_outer: the weight's rows are lanes (convolution) or members (linear).
template <class T>
void run_weight_grad(const WeightGrad<T>& common, int64_t groups, int64_t samples, bool lanes_outer,
                     bool coordinates, const Outputs& out, std::vector<double>& norms) {
  if (samples == 0 || common.lanes == 0) return;
  const Split split = split_work(common, groups, samples);
  const bool bias = out.wide_grad.numel() != 0;
  const int64_t positions = common.positions;
  const bool shares = split.panel_parts > 1 && !common.packed() &&
                      samples * groups * common.image_stride() <= kSharedImages;
  const int64_t image = common.packed() ? 0 : common.image_stride();
  const int64_t width = common.panel_width, bias_size = groups * split.panels * width;
  const auto sample_size = [&](int64_t panels) { return panels * positions * width + image + 16; };
  const int64_t most_panels = ceil_div(split.panels, split.panel_parts);
  // Where one chunk holds all samples, a tile is complete at once, and its sums are kept nowhere.
  const bool kept = split.sample_parts > 1 || chunk_of<T>(common, sample_size(most_panels), samples,
                                                          most_panels, coordinates) < samples;
  const int64_t sums = kept ? split.sums() * (coordinates ? 2 : 1) : 0;
  const int64_t row = lanes_outer ? common.members : common.lanes;
  const int64_t group = lanes_outer ? common.lanes * row : 0;  // from group to group
  const int64_t own = sums + bias_size * 2;  // weight sums, their squares, bias sums, squares
  // Few positions: norms by products of positions, the gradient as one product of all samples.
  const bool merged =
      method_of(common.lanes, common.members, positions, coordinates, false) == Method::gram;
  Scratch<T> images(shares ? samples * groups * common.image_stride() : 0);
  const auto images_of = [&](int64_t g) {
    return shares ? images.get() + g * samples * common.image_stride() : nullptr;
  };
  if (shares) {
    parallel_for(0, groups * samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / samples, s = i % samples;
        WeightGrad<T> a = common;
        a.narrow += g * a.channels * a.narrow_channel;
        pack_images_range(a, s, s + 1, images_of(g));
      }
    });
  }
  Scratch<T> totals(split.sample_parts * own);
  std::vector<double> task_norms(split.tasks() * samples, 0.0);
  parallel_for(0, split.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % groups, pp = task / groups % split.panel_parts;
      const int64_t sp = task / groups / split.panel_parts;
      const int64_t first_panel = split.panels * pp / split.panel_parts;
      const int64_t last_panel = split.panels * (pp + 1) / split.panel_parts;
      const int64_t panels = last_panel - first_panel;
      const int64_t first_sample = samples * sp / split.sample_parts;
      const int64_t last_sample = samples * (sp + 1) / split.sample_parts;
      WeightGrad<T> a = common;
      a.wide += g * a.lanes * a.wide_lane;
      a.narrow += g * a.channels * a.narrow_channel;
      a.images = images_of(g);
      T* base = totals.get() + sp * own;
      a.sum = kept ? base + g * split.panels * split.panel_elements : nullptr;
      a.sum_sq = kept && coordinates ? a.sum + split.sums() : nullptr;
      a.grad = kept ? nullptr : data<T>(out.grad) + g * group;
      a.grad_sq = kept || !coordinates ? nullptr : data<T>(out.grad_sq) + g * group;
      a.row = row;
      a.lanes_outer = lanes_outer;
      a.wide_sum = bias ? base + sums + g * split.panels * width : nullptr;
      a.wide_sum_sq = bias && coordinates ? a.wide_sum + bias_size : nullptr;
      for (T* region : {a.wide_sum, a.wide_sum_sq}) {
        if (region) std::fill(region + first_panel * width, region + last_panel * width, T(0));
      }
      a.norms = task_norms.data() + task * samples;
      a.chunk = last_sample - first_sample;
      if (kept) {
        const int64_t size = sample_size(panels);
        a.chunk = std::min(a.chunk, chunk_of<T>(a, size, a.chunk, panels, coordinates));
      }
      Scratch<T> scratch(a.chunk * (sample_size(panels) - (shares ? image : 0)));
      a.scratch = scratch.get();
      a.merged = merged;
      weight_grad_range(a, first_sample, last_sample, first_panel, last_panel);
    }
  });
  if (kept || bias) {
    parallel_for(0, groups * split.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / split.panels, panel = i % split.panels;
        const int64_t lanes = std::min(width, common.lanes - panel * width);
        for (int64_t k = 0; k < (coordinates ? 2 : 1); ++k) {
          if (kept) {
            T* sum = totals.get() + k * split.sums() + i * split.panel_elements;
            add_parts(sum + own, own, split.sample_parts - 1, sum, split.panel_elements);
            T* to = data<T>(k ? out.grad_sq : out.grad) + g * group +
                    panel * width * (lanes_outer ? row : 1);
            unpack_panel(sum, common.members, width, lanes, lanes_outer, row, to);
          }
          if (!bias) continue;
          T* bias_sum = totals.get() + sums + k * bias_size + i * width;
          add_parts(bias_sum + own, own, split.sample_parts - 1, bias_sum, width);
          std::copy(
              bias_sum, bias_sum + lanes,
              data<T>(k ? out.wide_grad_sq : out.wide_grad) + g * common.lanes + panel * width);
        }
      }
    });
  }
  if (merged) {
    parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      WeightGrad<T> a = common;
      a.norms = norms.data();
      Scratch<T> scratch(positions * ((split.panels + 1) * width + a.members) +
                         (shares ? 0 : image));
      a.scratch = scratch.get();
      for (int64_t g = 0; g < groups; ++g) {
        a.wide = common.wide + g * a.lanes * a.wide_lane;
        a.narrow = common.narrow + g * a.channels * a.narrow_channel;
        a.images = images_of(g);
        gram_norms_range(a, begin, end);
      }
    });
  }
  for (int64_t task = 0; task < split.tasks(); ++task) {
    for (int64_t i = 0; i < samples; ++i) norms[i] += task_norms[task * samples + i];
  }
}

// The gradients of the samples themselves: grads [samples, groups * lanes, members], rows of the
// weight being lanes (convolution), and their sums over positions bias [samples, groups * lanes],
// or null. Each is a batch of one sample, whose sum is not kept.
template <class T>
void run_sample_grads(const WeightGrad<T>& common, int64_t groups, int64_t samples, T* grads,
                      T* bias) {
  const int64_t lanes = common.lanes, width = common.panel_width, panels = ceil_div(lanes, width);
  const int64_t rows = groups * lanes, positions = common.positions;
  parallel_for(0, samples * groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(panels * positions * width + common.image_stride() + 16),
        sums(panels * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / groups, g = task % groups;
      double norm = 0;
      WeightGrad<T> a = common;
      a.wide += i * a.wide_sample + g * lanes * a.wide_lane;
      a.narrow += i * a.narrow_sample + g * a.channels * a.narrow_channel;
      a.grad = grads + (i * rows + g * lanes) * a.members;
      a.row = a.members;
      a.lanes_outer = a.merged = true;
      a.wide_sum = bias ? sums.get() : nullptr;
      if (bias) std::fill(sums.get(), sums.get() + panels * width, T(0));
      a.norms = &norm;
      a.scratch = scratch.get();
      a.chunk = 1;
      weight_grad_range(a, 0, 1, 0, panels);
      if (bias) std::copy(sums.get(), sums.get() + lanes, bias + i * rows + g * lanes);
    }
  });
}

}  // namespace adagrad_kernels
