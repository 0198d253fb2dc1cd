// One population: maximum, weights with ESS and log Z, fixed-point total, then offspring by the
// scheme and ancestors from them. Every step works on blocks of a fixed size; a population that
// fits one block runs all steps on a thread, a huge one is split block by block with the same
// result.
//
// Memory of a float32 population of K: two reads of the log weights, one write and two reads of the
// weights (scratch, 4 K bytes), and the outputs; the schemes that search have 8 K bytes of
// cumulative weights and 4 K of a guide into them, keep_slots has 8 K bytes of slots to fill.
#include "resampling/resample_simd.h"

#include <cmath>

#include "common/dispatch_simd.h"
#include "resampling/schemes.h"
#include "resampling/small_populations.h"
#include "resampling/work.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// Slots [begin, end) of a population that is not resampled: the identity and the weights carried.
// Only one without any weight comes here with another number of samples, and then in turns.
template <typename T>
void keep(const Arrays<T>& arrays, const Population& p, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    arrays.ancestors[j] = j < p.particles ? j : j % p.particles;
  }
  const int64_t known = end < p.particles ? end : p.particles;
  if (begin < known)
    carry(arrays.log_weights + begin, known - begin, arrays.new_log_weights + begin);
  for (int64_t j = begin > known ? begin : known; j < end; ++j) {
    arrays.new_log_weights[j] = -std::numeric_limits<WeightOf<T>>::infinity();
  }
}

template <typename T>
void step(const Work<T>& work, const Arrays<T>& arrays, int which, int64_t begin, int64_t end) {
  const ResampleCall& call = work.call;
  const Population& p = work.population;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock;
    switch (which) {
      case kTop:
        block_top(arrays.log_weights + first, work.length(b), &work.block(b));
        break;
      case kWeigh:
        block_weights(arrays.log_weights + first, work.length(b), p.top, work.weights + first);
        block_sums(work.weights + first, work.length(b), &work.block(b));
        break;
      case kTotal:
        block_total(work.weights + first, work.length(b), p.scale, &work.block(b));
        break;
      case kSpread:
        spread_block(work, arrays, b);
        break;
      case kGuide:
        guide_block(work, b, p.total);
        break;
      case kSearch: {
        const int64_t last = p.samples - first < kBlock ? p.samples : first + kBlock;
        int64_t* ancestors = call.keep_slots ? nullptr : arrays.ancestors;
        if (call.scheme == Scheme::kKilling) {
          kill(work, first, last, arrays.offspring, ancestors);
        } else {
          draw(work, p.total, first, last, arrays.offspring, ancestors);
        }
        break;
      }
      default: {  // kFinish
        const int64_t last = p.samples - first < kBlock ? p.samples : first + kBlock;
        if (!p.resampled) {
          keep(arrays, p, first, last);
        } else if (call.scheme == Scheme::kOptimal) {
          weigh_kept_and_drawn(work, arrays, first, last);
        } else {
          for (int64_t j = first; j < last; ++j) arrays.new_log_weights[j] = 0;
        }
        break;
      }
    }
  }
}

template <typename T>
void settle(const Work<T>& work, const Arrays<T>& arrays, int which) {
  const ResampleCall& call = work.call;
  Population& p = work.population;
  const int64_t sample_blocks = (p.samples + kBlock - 1) / kBlock;
  const bool independent = call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kKilling;
  switch (which) {
    case kTop: {
      p.top = -std::numeric_limits<double>::infinity();
      for (int64_t b = 0; b < p.blocks; ++b) {
        if (work.block(b).top > p.top) p.top = work.block(b).top;
        if (work.block(b).nan) p.status |= kStatusNan;
      }
      if (p.particles == 0) p.status |= kStatusNothingLive;
      if (p.particles > 0 && std::isinf(p.top)) {
        p.status |= p.top > 0 ? kStatusInfinite : kStatusNoWeight;
      }
      p.items = p.status & (kStatusNoWeight | kStatusNothingLive) ? 0 : p.blocks;
      break;
    }
    case kWeigh: {
      if (p.items == 0) break;
      p.sum = 0.0;
      p.squares = 0.0;
      for (int64_t b = 0; b < p.blocks; ++b) {
        p.sum += work.block(b).sum;
        p.squares += work.block(b).squares;
      }
      p.ess = p.sum * p.sum / p.squares;
      p.resampled =
          call.ess_threshold < 0 || p.ess < call.ess_threshold * static_cast<double>(p.particles);
      if (p.resampled) {
        p.log_z = log_of(p.sum / static_cast<double>(p.particles)) + p.top;
        // The total is at most 2^60: remainders of a wrong guess fit a signed integer.
        p.scale = power_of_two(59 - exponent_of(p.sum));
        if (p.pinned >= 0) give_least_weight(work);
      }
      p.items = p.resampled ? p.blocks : 0;
      break;
    }
    case kTotal: {
      p.total = 0;
      for (int64_t b = 0; b < p.blocks && p.resampled; ++b) {
        work.block(b).start = p.total;
        p.total += work.block(b).total;
      }
      if (p.resampled && call.scheme == Scheme::kOptimal) find_threshold(work);
      if (p.resampled && p.pinned >= 0) decide_by_pinned(work);
      break;
    }
    case kSpread:
      if (!p.resampled) break;
      if (call.scheme == Scheme::kResidual) residual(work, arrays);
      if (call.scheme == Scheme::kSsp) pair_runs(work, arrays.offspring);
      if (call.scheme == Scheme::kKilling && p.pinned >= 0) {
        p.forced.element = killed_slot(p.pinned, p.particles, static_cast<uint64_t>(p.scale),
                                       p.total, pinned_bits(call, p, kPinnedPoint),
                                       [&](int64_t k) { return work.cumulative[k]; });
      }
      p.items = independent && guide_bits(p.particles) != 0 ? p.blocks : 0;
      break;
    case kGuide:
      p.items = p.resampled && independent ? sample_blocks : 0;
      break;
    case kSearch:
      if (p.resampled) arrange(work, arrays);
      p.items = sample_blocks;
      break;
    default:  // kFinish
      for (int64_t k = 0; k < p.particles && !p.resampled; ++k) {
        arrays.offspring[k] = p.samples == p.particles
                                  ? 1
                                  : p.samples / p.particles + (k < p.samples % p.particles ? 1 : 0);
      }
      break;
  }
}

template <typename T>
void report(const ResampleCall& call, const Population& p) {
  static_cast<WeightOf<T>*>(call.log_z)[p.row] = static_cast<WeightOf<T>>(p.log_z);
  static_cast<WeightOf<T>*>(call.ess)[p.row] = static_cast<WeightOf<T>>(p.ess);
  call.resampled[p.row] = p.resampled;
  call.status[p.row] = p.status;
}

template <typename T>
void run(const Work<T>& work, const Arrays<T>& arrays) {
  for (int which = 0; which < kSteps; ++which) {
    if (work.population.items > 0) step(work, arrays, which, 0, work.population.items);
    settle(work, arrays, which);
  }
  report<T>(work.call, work.population);
}

int64_t pinned_of(const ResampleCall& call, int64_t row) {
  return call.pinned != nullptr ? call.pinned[row] : -1;
}

// The live particles are gathered and form a population of their own; the others keep their slot,
// and their weight is divided by what the live ones' weights were divided by.
template <typename T>
void run_masked(const Work<T>& work, int64_t row) {
  const ResampleCall& call = work.call;
  const Arrays<T> whole = row_arrays<T>(call, row);
  const auto* mask = static_cast<const unsigned char*>(call.mask) + row * call.mask_stride;
  const int64_t k = (call.particles + 15) / 16 * 16;
  char* memory = work.scratch + work.at.masked;
  auto* slot = reinterpret_cast<int64_t*>(memory);
  auto* live_log_weights = reinterpret_cast<T*>(memory + k * 8);
  const Arrays<T> live = {live_log_weights, reinterpret_cast<int64_t*>(memory + 2 * k * 8),
                          reinterpret_cast<int64_t*>(memory + 3 * k * 8),
                          reinterpret_cast<WeightOf<T>*>(memory + 4 * k * 8)};
  int64_t count = 0;
  int64_t pinned = -1;
  for (int64_t i = 0; i < call.particles; ++i) {
    if (!mask[i]) continue;
    if (i == pinned_of(call, row)) pinned = count;
    slot[count] = i;
    std::memcpy(live_log_weights + count, whole.log_weights + i, sizeof(T));
    ++count;
  }
  start(work, row, count, count, pinned);
  run(work, live);
  const double log_z = work.population.log_z;
  for (int64_t i = 0; i < call.particles; ++i) {
    if (mask[i]) continue;
    whole.ancestors[i] = i;
    whole.offspring[i] = 1;
    carry(whole.log_weights + i, 1, whole.new_log_weights + i);
    const double lowered = static_cast<double>(whole.new_log_weights[i]) - log_z;
    // Infinite on both sides: finished and live share the mass.
    whole.new_log_weights[i] = static_cast<WeightOf<T>>(lowered == lowered ? lowered : 0.0);
  }
  for (int64_t i = 0; i < count; ++i) {
    whole.ancestors[slot[i]] = slot[live.ancestors[i]];
    whole.offspring[slot[i]] = live.offspring[i];
    whole.new_log_weights[slot[i]] = live.new_log_weights[i];
  }
}

}  // namespace

void resample_rows(const ResampleCall& call, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      if (is_small(call)) {
        const int64_t k = call.particles;
        const auto small = k == 4    ? &resample_small<4, true, T>
                           : k < 4   ? &resample_small<4, false, T>
                           : k == 8  ? &resample_small<8, true, T>
                           : k < 8   ? &resample_small<8, false, T>
                           : k == 16 ? &resample_small<16, true, T>
                                     : &resample_small<16, false, T>;
        return small(call, begin, end);
      }
    }
    const Work<T> work(call, scratch);
    for (int64_t row = begin; row < end; ++row) {
      if (call.mask != nullptr) {
        run_masked(work, row);
      } else {
        start(work, row, call.particles, call.samples, pinned_of(call, row));
        run(work, row_arrays<T>(call, row));
      }
    }
  });
}

void resample_start(const ResampleCall& call, int64_t row, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    start(Work<T>(call, scratch), row, call.particles, call.samples, pinned_of(call, row));
  });
}

void resample_step(const ResampleCall& call, int which, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(call, scratch);
    step(work, row_arrays<T>(call, work.population.row), which, begin, end);
  });
}

void resample_settle(const ResampleCall& call, int which, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(call, scratch);
    settle(work, row_arrays<T>(call, work.population.row), which);
    if (which == kSteps - 1) report<T>(call, work.population);
  });
}

}  // namespace winnow::CPU_CAPABILITY
