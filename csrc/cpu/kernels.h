// The CPU kernels: raw pointers in, raw pointers out, no torch header. Each works on a range,
// so that binding.cpp decides how the work is split over threads. T is float or double.
#pragma once

#include <cstdint>

#include "../common/adagrad.h"

namespace adagrad_kernels {

// sample_statistics.inl: columns [first, last) of g [rows, stride]; sum and sum_sq are
// overwritten there, norms_sq [rows] is added to.
template <class T>
void sample_statistics_range(const T* g, int64_t rows, int64_t stride, int64_t first, int64_t last,
                             T* sum, T* sum_sq, double* norms_sq);

// adagrad.inl: one run of elements of one tensor.
template <class T>
AdagradReductions adagrad_range(T* param, const T* grad, T* sum, const T* coordinate_sums,
                                int64_t n, const AdagradOptions& options);
// The two passes of the scalar method: squared norms first, then the step with the common
// denominator sqrt(v) + eps.
template <class T>
AdagradReductions adagrad_norm_reduce_range(const T* param, const T* grad, int64_t n,
                                            const AdagradOptions& options);
template <class T>
AdagradReductions adagrad_norm_update_range(T* param, const T* grad, const T* coordinate_sums,
                                            int64_t n, double denominator,
                                            const AdagradOptions& options);

// linear.inl: samples [first, last) of grad_out [b, T, O] and input [b, T, I], both contiguous.
//
// T = 1: the gradient of a sample is an outer product, so norms[i] = |d_i|^2 (|x_i|^2 + 1),
// the 1 being the bias. norms is overwritten.
template <class T>
void outer_norms_range(const T* grad_out, int64_t out_features, const T* input, int64_t in_features,
                       bool bias, int64_t first, int64_t last, T* norms);
// Any T: sums over positions, the bias gradient of each sample; sum and sum_sq [O] and norms
// are added to, sum_sq may be null. scratch [O].
template <class T>
void bias_range(const T* grad_out, int64_t positions, int64_t out_features, int64_t first,
                int64_t last, T* sum, T* sum_sq, double* norms, T* scratch);

// outer.inl: grad [rows, columns] = grad_out' * input and, where grad_sq is not null, the same of
// their squares; grad_out [samples, rows] and input [samples, columns], contiguous.
//
// outer_tiles tells how rows and columns divide. outer_pack_range packs grad_out for tiles
// [first, last) into packed [tiles.packed * tiles.row_tiles * samples], outer_panel_range computes
// one panel of columns for a run of tiles; scratch [kOuterChunk * tiles.width].
constexpr int64_t kOuterChunk = 256;
template <class T>
struct Outer {
  const T *grad_out, *input;
  int64_t samples, rows, columns;
  T *grad, *grad_sq;
};
struct OuterTiles {
  int64_t packed, row_tiles, width, panels;
};
template <class T>
OuterTiles outer_tiles(const Outer<T>& a);
template <class T>
void outer_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed);
template <class T>
void outer_panel_range(const Outer<T>& a, const T* packed, int64_t panel, int64_t first,
                       int64_t last, T* scratch);

// linear_update.inl: AdaGrad's update of weight and sum [rows, columns] with the gradient of
// `product` (whose grad is not used); its sums of squares are written where grad_sq is not null.
//
// linear_update_pack_range packs panels [first, last) of the input into packed [tiles.panels *
// samples * tiles.width]; linear_update_range updates the rows of tiles [first, last), all columns,
// from both packed operands. scratch [kTileScratch * (last - first)].
constexpr int64_t kTileScratch = 1024;
template <class T>
struct LinearUpdate {
  Outer<T> product;
  T *weight, *sum;
  AdagradOptions options;
};
template <class T>
void linear_update_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed);
template <class T>
AdagradReductions linear_update_range(const LinearUpdate<T>& a, const T* grad_out, const T* input,
                                      int64_t first, int64_t last, T* scratch);

// gram.inl: |sum over t of u_t v_t'|² of one sample, u [positions, nu] and v [positions, nv].
template <class T>
double gram_norm(const T* u, int64_t nu, const T* v, int64_t nv, int64_t positions);
// Whether that, and the weight gradient as one product over all positions, is the cheaper way.
constexpr bool gram_is_cheaper(int64_t nu, int64_t nv, int64_t positions) {
  return positions <= 32 && 3 * positions * (nu + nv) < nu * nv;
}
// How a weight gradient [nu, nv] and the norms of its samples are found: a product over all samples
// of one position each (linear layers), a product and the above, or each sample's gradient itself.
enum class Method { outer, gram, direct };
constexpr Method method_of(int64_t nu, int64_t nv, int64_t positions, bool coordinates,
                           bool linear) {
  if (linear && positions == 1) return Method::outer;
  return !coordinates && gram_is_cheaper(nu, nv, positions) ? Method::gram : Method::direct;
}

// scale.inl: samples [first, last) of grad_out and input, both contiguous [b, T, C, S]; statistics
// by strides of b, T and C. Sums [C] are added to where they are not null, norms as well.
// scratch [2 C].
template <class T>
struct ScaleGrad {
  const T *grad_out, *input, *mean, *rstd;
  int64_t mean_sample, mean_position, mean_channel;
  int64_t rstd_sample, rstd_position, rstd_channel;
  int64_t positions, channels, inner;  // T, C, S
};
template <class T>
struct ScaleSums {
  T *weight, *bias, *weight_sq, *bias_sq;
};
template <class T>
void scale_range(const ScaleGrad<T>& a, int64_t first, int64_t last, const ScaleSums<T>& out,
                 double* norms, T* scratch);

// norm_backward.inl: dx of a normalisation, and the sums of its scale and shift as above. grad_out,
// input and grad_input have one layout: [b, T, C, S], or [b, T, S, C] where channels_last.
//
// norm_samples_range: samples [first, last), mean (or null) and rstd [b, T, groups].
// scratch [8 C].
template <class T>
struct NormBackward {
  const T *grad_out, *input, *mean, *rstd, *scale;
  int64_t samples, positions, channels, inner, groups;  // b, T, C, S
  bool channels_last;
  T* grad_input;
  T* sample_grads;  // [b, 2, C], gradients of scale and shift of each sample, or null
};
template <class T>
void norm_samples_range(const NormBackward<T>& a, int64_t first, int64_t last,
                        const ScaleSums<T>& out, double* norms, T* scratch);
// bfloat16_to_float and back: n numbers, given as their bits; to the nearest, ties to even.
void bfloat16_to_float(const uint16_t* bits, int64_t n, float* out);
void float_to_bfloat16(const float* values, int64_t n, uint16_t* out);
// norm_channels_range: at most kBatchBlock channels [first, last) of the whole batch, mean and rstd
// [C], T = 1. Each sample's gradients of scale and shift are written to samples [b, 2, C], which
// add_samples_range adds up.
constexpr int64_t kBatchBlock = 256;
template <class T>
void norm_channels_range(const NormBackward<T>& a, int64_t first, int64_t last, T* samples);
template <class T>
void add_samples_range(const T* samples, int64_t channels, int64_t first, int64_t last,
                       const ScaleSums<T>& out, double* norms);

// embedding.inl: columns [first, last) of all samples; sum and sum_sq (or null) [V, width] and
// norms [samples] are added to. scratch [last - first].
template <class T>
struct EmbeddingGrad {
  const T* grad_out;      // [samples, positions, width]
  const int64_t* tokens;  // [samples, positions]
  const int64_t* order;   // [samples, positions]: a sample's positions ordered by token
  int64_t samples, positions, width, padding_idx;
  T *sum, *sum_sq;
};
template <class T>
void embedding_range(const EmbeddingGrad<T>& a, int64_t first, int64_t last, double* norms,
                     T* scratch);

// weight_grad.inl: the weight gradient of samples [first, last) with their squared norms.
//
//   gradient_s[m, n] = sum over t of narrow_s[base[m] + position(t)] * wide_s[t, n]
//
// n runs along vector lanes, m along registers. Linear: n = input feature, m = output feature.
// Convolution: n = output channel, m = (input channel, kernel offset); narrow is the padded
// image itself, so nothing is unfolded.
template <class T>
struct WeightGrad {
  // wide: element (s, t, n) at wide[s * wide_sample + t * wide_position + n * wide_lane]
  const T* wide;
  int64_t wide_sample, wide_position, wide_lane;
  int64_t lanes;        // how many n
  int64_t panel_width;  // lanes a panel: panel_width<T>(lanes)
  // narrow: image (s, c, f, h, w) by strides, packed with zero padding to
  // [channels][depth][height][width]
  const T* narrow;
  int64_t narrow_sample, narrow_channel, narrow_frame, narrow_row, narrow_column;
  int64_t channels, frames, rows, columns;                     // of the image as given
  int64_t pad_front, pad_top, pad_left, depth, height, width;  // of the packed image
  const int64_t* base;                                         // [members], offsets into it
  int64_t members;                                             // how many m
  const int64_t* position;                                     // [positions], offsets into it
  int64_t positions;                                           // how many t
  const T* images;  // the packed images of all samples, or null: then each range packs its own
  int64_t image() const { return channels * depth * height * width; }
  // From one packed image to the next; no power of two, at which they would share cache lines'
  // sets.
  int64_t image_stride() const { return image() + 16; }
  bool packed() const {  // whether narrow is as if packed
    return frames == depth && rows == height && columns == width && narrow_column == 1 &&
           narrow_row == width && narrow_frame == height * width &&
           narrow_channel == depth * height * width;
  }
  // outputs: norms and the bias are added to, the others overwritten. Either sum (and sum_sq where
  // squares are wanted), to be joined later, or where one chunk holds all samples grad (and
  // grad_sq)
  T* sum;            // [panels][members][panel_width], or null
  T* sum_sq;         // the same
  T* grad;           // rows of the weight, or null
  T* grad_sq;        // the same
  int64_t row;       // elements from row to row
  bool lanes_outer;  // row = lane (convolution), otherwise row = member (linear)
  double* norms;     // [samples of the whole batch]
  T* wide_sum;       // [panels][panel_width]: the bias of a convolution, or null
  T* wide_sum_sq;    // the same, or null
  T* scratch;        // chunk * (panels * positions * panel_width + 16) elements, and chunk *
                     // image_stride() where images are to be packed
  int64_t chunk;     // samples packed at a time
  bool merged;       // no norms: the samples' positions are those of one sample
};
// Panels are one or two AVX-512 registers wide: narrow ones where the lanes would not fill two.
template <class T>
constexpr int64_t panel_width(int64_t lanes) {
  const int64_t width = 64 / static_cast<int64_t>(sizeof(T));
  return (lanes + width - 1) / width % 2 == 1 && lanes <= 3 * width ? width : 2 * width;
}
template <class T>
void weight_grad_range(const WeightGrad<T>& a, int64_t first, int64_t last, int64_t first_panel,
                       int64_t last_panel);
// Samples [first, last) of `images`.
template <class T>
void pack_images_range(const WeightGrad<T>& a, int64_t first, int64_t last, T* images);
// The norms of samples [first, last) where they are merged. scratch: positions * (panel_width +
// panels * panel_width + members) elements, and the image where it is to be packed.
template <class T>
void gram_norms_range(const WeightGrad<T>& a, int64_t first, int64_t last);
// A finished panel to rows of the weight: row = lane where lanes_outer, otherwise row = member.
template <class T>
void unpack_panel(const T* panel, int64_t members, int64_t panel_width, int64_t lanes,
                  bool lanes_outer, int64_t out_stride, T* out);

}  // namespace adagrad_kernels
