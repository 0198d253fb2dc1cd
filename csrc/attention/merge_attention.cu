// winnow::merge_attention on the GPU: out = sum_p w_p out_p with w_p = exp(lse_p - lse) and lse =
// log sum_p exp(lse_p). A warp per row, in the order of the parts. A part that saw nothing (lse =
// -inf) has no weight and its row is not read. Traffic: one read of the parts, one write.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <type_traits>

#include "attention/merge_arguments.h"
#include "common/device.h"

namespace winnow {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostParts = 64;  // they are the kernel's argument: no copy to the GPU

template <typename T, typename Acc>
struct MergePart {
  Global<const T> out;
  Global<const Acc> lse;
  int64_t out_stride, lse_stride;
};

template <typename T, typename Acc>
struct MergeCall {
  MergePart<T, Acc> part[kMostParts];
  int parts;
  int64_t rows, dim;

  WINNOW_DEVICE Acc lse(int p, int64_t row) const { return part[p].lse[row * part[p].lse_stride]; }
  WINNOW_DEVICE Acc value(int p, int64_t row, int64_t d) const {
    const T x = part[p].out[row * part[p].out_stride + d];
    return static_cast<Acc>(x);
  }
};

WINNOW_DEVICE int64_t own_row() {
  return block_index() * (kThreads / kWarp) + warp_index();
}

template <typename T, typename Acc>
WINNOW_KERNEL(kThreads)
merge_rows(MergeCall<T, Acc> call, Global<T> outs, Global<Acc> lses) {
  constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
  const int64_t row = own_row();
  if (row >= call.rows) return;
  Acc top = kNone;
  for (int p = 0; p < call.parts; ++p) {
    const Acc lse = call.lse(p, row);
    top = lse > top || lse != lse ? lse : top;
    if (top != top) break;
  }
  Acc sum = 0;
  for (int p = 0; p < call.parts && top != kNone; ++p) sum += std::exp(call.lse(p, row) - top);
  const Acc lse = top == kNone ? kNone : top + std::log(sum);
  if (lane_index() == 0) lses[row] = lse;
  for (int64_t d = lane_index(); d < call.dim; d += kWarp) {
    Acc total = 0;
    for (int p = 0; p < call.parts; ++p) {
      const Acc own = call.lse(p, row);
      if (own != kNone) total = fma(std::exp(own - lse), call.value(p, row, d), total);
    }
    outs[row * call.dim + d] = static_cast<T>(total);
  }
}

// d out_p = w_p d out, d lse_p = w_p (d out . (out_p - out) + d lse)
template <typename T, typename Acc>
WINNOW_KERNEL(kThreads)
merge_rows_backward(MergeCall<T, Acc> call, MergePart<T, Acc> merged, MergePart<T, Acc> grad,
                    Global<T> grad_outs, Global<Acc> grad_lses) {
  constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
  const int64_t row = own_row();
  if (row >= call.rows) return;
  const Acc lse = merged.lse[row * merged.lse_stride];
  const Acc grad_lse = grad.lse[row * grad.lse_stride];
  for (int p = 0; p < call.parts; ++p) {
    const Acc own = call.lse(p, row);
    const bool seen = own != kNone;
    const Acc weight = seen ? std::exp(own - lse) : Acc(0);
    const int64_t to = p * call.rows + row;
    Acc sum = 0;
    for (int64_t d = lane_index(); d < call.dim; d += kWarp) {
      Acc change = 0;
      if (seen) {
        const T g = grad.out[row * grad.out_stride + d];
        const T o = merged.out[row * merged.out_stride + d];
        sum = fma(static_cast<Acc>(g), call.value(p, row, d) - static_cast<Acc>(o), sum);
        change = weight * static_cast<Acc>(g);
      }
      grad_outs[to * call.dim + d] = static_cast<T>(change);
    }
    sum = warp_reduce(sum, [](Acc a, Acc b) { return a + b; });
    if (lane_index() == 0) grad_lses[to] = seen ? weight * (sum + grad_lse) : Acc(0);
  }
}

// Rows kept alive next to the pointers to them.
struct MergeOperand {
  Rows out, lse;

  MergeOperand(const Tensor& out, const Tensor& lse)
      : out(as_rows(out)), lse(as_rows(torch::stable::unsqueeze(lse, -1))) {}

  template <typename T, typename Acc>
  MergePart<T, Acc> part() const {
    return {global<const T>(out.tensor), global<const Acc>(lse.tensor), out.stride, lse.stride};
  }
};

std::vector<MergeOperand> operands_of(const std::vector<Tensor>& outs,
                                      const std::vector<Tensor>& lses) {
  check_parts(outs, lses);
  WINNOW_CHECK(static_cast<int64_t>(outs.size()) <= kMostParts, "outs: expected at most ",
               kMostParts, " partial results on a GPU (merge in rounds), got ", outs.size());
  std::vector<MergeOperand> operands;
  for (size_t p = 0; p < outs.size(); ++p) operands.emplace_back(outs[p], lses[p]);
  return operands;
}

template <typename T, typename Acc>
MergeCall<T, Acc> call_of(const std::vector<MergeOperand>& operands) {
  MergeCall<T, Acc> call = {};
  call.parts = static_cast<int>(operands.size());
  call.rows = operands[0].lse.count;
  call.dim = operands[0].out.length;
  for (size_t p = 0; p < operands.size(); ++p) call.part[p] = operands[p].part<T, Acc>();
  return call;
}

// fn receives zeros of the element type and of the sums' type.
template <typename Fn>
void dispatch_merge(const Tensor& out, const Fn& fn) {
  dispatch_floating(out, [&](auto zero) {
    fn(zero, std::conditional_t<std::is_same_v<decltype(zero), double>, double, float>{});
  });
}

Grid grid_of(int64_t rows) {
  return {ceil_div<int64_t>(rows, kThreads / kWarp)};
}

std::tuple<Tensor, Tensor> merge_attention_cuda(const std::vector<Tensor>& outs,
                                                const std::vector<Tensor>& lses) {
  const auto operands = operands_of(outs, lses);
  const Stream stream(outs[0]);
  Tensor out = empty(shape(outs[0]), outs[0].scalar_type(), outs[0]);
  Tensor lse = empty(leading_shape(outs[0]), statistics_dtype(outs[0]), outs[0]);
  dispatch_merge(out, [&](auto element, auto wide) {
    using T = decltype(element);
    using Acc = decltype(wide);
    launch("merge_attention", merge_rows<T, Acc>, grid_of(lse.numel()), kThreads, stream,
           call_of<T, Acc>(operands), global<T>(out), global<Acc>(lse));
  });
  return {out, lse};
}

// Gradients stacked along a new first dimension: (P, ..., N, D) and (P, ..., N).
std::tuple<Tensor, Tensor> merge_attention_backward_cuda(const Tensor& grad_out,
                                                         const Tensor& grad_lse,
                                                         const std::vector<Tensor>& outs,
                                                         const std::vector<Tensor>& lses,
                                                         const Tensor& out, const Tensor& lse) {
  const auto operands = operands_of(outs, lses);
  check_merged(grad_out, grad_lse, outs, lses, out, lse);
  const Stream stream(out);
  const Tensor grad_outs = stacked(out, outs.size());
  const Tensor grad_lses = stacked(lse, outs.size());
  const MergeOperand merged(out, lse);
  const MergeOperand grad(grad_out, grad_lse);
  dispatch_merge(out, [&](auto element, auto wide) {
    using T = decltype(element);
    using Acc = decltype(wide);
    launch("merge_attention_backward", merge_rows_backward<T, Acc>, grid_of(lse.numel()), kThreads,
           stream, call_of<T, Acc>(operands), merged.part<T, Acc>(), grad.part<T, Acc>(),
           global<T>(grad_outs), global<Acc>(grad_lses));
  });
  return {grad_outs, grad_lses};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("merge_attention", TORCH_BOX(&winnow::merge_attention_cuda));
  m.impl("merge_attention_backward", TORCH_BOX(&winnow::merge_attention_backward_cuda));
}
