// The loops that callers wait for, each once on fixed inputs, for test_instruction_counts.py to
// count the instructions of: under callgrind every case leaves a profile with its name. Linked with
// the object files of one instruction set.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "attention/attention_backward_simd.h"
#include "attention/attention_forward_simd.h"
#include "attention/merge_attention_simd.h"
#include "kvcache/block_scores_simd.h"
#include "kvcache/paged_attention_simd.h"
#include "kvcache/paged_quantise_simd.h"
#include "resampling/effective_sample_size_simd.h"
#include "resampling/next_temperature_simd.h"
#include "resampling/resample_simd.h"
#include "resampling/sample_without_replacement_simd.h"
#include "unmasking/logit_stats_simd.h"
#include "unmasking/logit_truncation_simd.h"
#include "unmasking/soft_embedding_simd.h"
#include "unmasking/speculative_verify_simd.h"

namespace loops = winnow::AVX2;
using namespace winnow;

namespace {

template <typename Loop>
void count(const char* name, const Loop& loop) {
  CALLGRIND_ZERO_STATS;
  loop();
  CALLGRIND_DUMP_STATS_AT(name);
}

// Memory of any element type, filled with numbers between -4 and 4, aligned like a tensor's.
class Numbers {
 public:
  explicit Numbers(int64_t count, ElementType type = ElementType::kFloat)
      : bytes_(static_cast<size_t>(count * size_of(type) + 64)) {
    data_ = bytes_.data() + (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64);
    uint32_t state = 12345;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(state >> 8) * 0x1p-21f - 4.0f;
      if (type == ElementType::kFloat) {
        std::memcpy(data_ + 4 * i, &value, 4);
      } else {  // the upper half of a float is a bfloat16
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const auto upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(data_ + 2 * i, &upper, 2);
      }
    }
  }
  char* data() { return data_; }
  float* floats() { return reinterpret_cast<float*>(data_); }

 private:
  static int64_t size_of(ElementType type) { return type == ElementType::kFloat ? 4 : 2; }
  std::vector<char> bytes_;
  char* data_;
};

// unmasking
constexpr int64_t kBlocksOfVocab = 32;
constexpr int64_t kVocab = kBlocksOfVocab * kLogitBlock;
constexpr int64_t kFirstRow = 0;

LogitRows logit_rows(Numbers& logits, ElementType type) {
  LogitRows rows{};
  rows.logits = logits.data();
  rows.stride = kVocab;
  rows.guidance = 1.0;
  rows.type = type;
  rows.vocab = kVocab;
  return rows;
}

void unmasking() {
  Numbers floats(kVocab + kLogitBlock);
  Numbers halves(kVocab, ElementType::kBFloat16);
  Numbers scratch(kVocab);
  Numbers out(512);
  LogitBlockSums sums[kBlocksOfVocab];
  Truncation kept;
  double mass = 0.0;
  int64_t ids[32];
  for (int64_t i = 0; i < 32; ++i) ids[i] = i * 7 % 64;
  const LogitRows rows = logit_rows(floats, ElementType::kFloat);
  const LogitRows half_rows = logit_rows(halves, ElementType::kBFloat16);
  LogitRows draft = rows;  // other numbers
  draft.logits = floats.floats() + kLogitBlock;
  count("logit blocks, float, draw",
        [&] { loops::scan_logit_blocks(rows, &kFirstRow, 0, kBlocksOfVocab, 1.0, 0.7, sums); });
  count("logit blocks, bfloat16", [&] {
    loops::scan_logit_blocks(half_rows, &kFirstRow, 0, kBlocksOfVocab, 1.0, 1.0, sums);
  });
  count("truncation, top-k and top-p", [&] {
    // The sum of the exponentials of numbers that are spread evenly between -4 and 4, about.
    loops::find_truncation(rows, 0, 4.0f, 1.0, 50, 0.9, kVocab / 8.0, scratch.floats(), &kept);
  });
  const ResidualRow row{0, 4.0f, 0x1p-12f, 0, 4.0f, 0x1p-12f, -1};
  count("residual blocks", [&] {
    for (int64_t block = 0; block < kBlocksOfVocab; ++block) {
      loops::sum_residual_block(rows, draft, row, 1.0, block, &mass);
    }
  });
  count("mixed embedding", [&] {
    loops::mix_rows(ElementType::kFloat, floats.data(), 512, 512, ids, floats.floats(), 32, 0.5f,
                    floats.data(), 0.5f, scratch.floats(), out.data());
  });
}

// resampling
constexpr int64_t kParticles = 4096;
constexpr int64_t kPopulations = 4;

void resampling() {
  Numbers weights(kPopulations * kParticles);
  std::vector<int64_t> ancestors(kPopulations * kParticles), offspring(kPopulations * kParticles);
  Numbers new_weights(kPopulations * kParticles), inclusion(kPopulations * kParticles);
  float log_z[kPopulations], ess[kPopulations];
  bool resampled[kPopulations];
  int32_t status[kPopulations];
  count("effective sample size", [&] {
    loops::effective_sample_size_rows(weights.data(), ElementType::kFloat, kParticles, kPopulations,
                                      kParticles, ess);
  });

  ResampleCall call{};
  call.log_weights = weights.data();
  call.type = ElementType::kFloat;
  call.stride = call.particles = call.samples = kParticles;
  call.rows = kPopulations;
  call.seed = 7;
  call.ess_threshold = -1.0;
  call.ancestors = ancestors.data();
  call.offspring = offspring.data();
  call.new_log_weights = new_weights.data();
  call.log_z = log_z;
  call.ess = ess;
  call.resampled = resampled;
  call.status = status;
  const auto run = [&](const char* name, Scheme scheme) {
    call.scheme = scheme;
    Numbers scratch(resample_scratch(call).bytes / 4);
    count(name, [&] { loops::resample_rows(call, 0, kPopulations, scratch.data()); });
  };
  run("resample, systematic", Scheme::kSystematic);
  run("resample, multinomial", Scheme::kMultinomial);
  run("resample, ssp", Scheme::kSsp);

  const double beta[kPopulations] = {};
  TemperingCall tempering{};
  tempering.log_likelihood = weights.data();
  tempering.type = ElementType::kFloat;
  tempering.likelihood_stride = tempering.particles = kParticles;
  tempering.beta = beta;
  tempering.target = 0.5;
  tempering.max_beta = 1.0;
  tempering.result = ess;
  Numbers tempering_memory(tempering_scratch(tempering) / 4);
  count("next temperature",
        [&] { loops::next_temperature_rows(tempering, 0, kPopulations, tempering_memory.data()); });

  SampleCall sample{};
  sample.log_weights = weights.data();
  sample.type = ElementType::kFloat;
  sample.stride = sample.particles = kParticles;
  sample.k = 64;
  sample.design = Design::kGumbelTopK;
  sample.seed = 7;
  sample.indices = ancestors.data();
  sample.inclusion = inclusion.data();
  sample.weights = new_weights.data();
  Numbers sample_memory(sample_scratch(sample) / 4);
  count("Gumbel top-k", [&] { loops::sample_rows(sample, 0, kPopulations, sample_memory.data()); });
}

// attention
constexpr int64_t kHeads = 2;
constexpr int64_t kRows = 256;
constexpr int64_t kDim = 64;

AttentionProblem chunks(Numbers& numbers, ElementType type) {
  AttentionProblem problem;
  problem.type = type;
  problem.batch = 1;
  problem.query_heads = problem.kv_heads = kHeads;
  problem.dim = kDim;
  problem.scale = 0.125;
  problem.pattern.rows = kRows;
  problem.pattern.chunk_size = 64;
  problem.pattern.slots = 4;
  problem.pattern.initial_slots = problem.pattern.slots_per_chunk = 1;
  problem.query = problem.key = problem.value = problem.slot_key =
      problem.slot_value = {numbers.data(), kHeads * kRows * kDim, kRows * kDim, kDim};
  return problem;
}

void attention() {
  const int64_t size = kHeads * kRows * kDim;
  Numbers floats(size), halves(size, ElementType::kBFloat16), out(size);
  Numbers lse(kHeads * kRows), grad_lse(kHeads * kRows);
  Numbers memory(forward_scratch_bytes(kDim) / 4);
  const auto forward = [&](const char* name, const AttentionProblem& problem) {
    count(name, [&] {
      loops::attention_forward(problem, 0, forward_units(problem), memory.data(), out.data(),
                               lse.data());
    });
  };
  const AttentionProblem problem = chunks(floats, ElementType::kFloat);
  forward("attention, bfloat16", chunks(halves, ElementType::kBFloat16));
  forward("attention, float", problem);

  BackwardProblem backward;
  backward.forward = problem;
  backward.out = out.data();
  backward.lse = lse.data();
  backward.grad_lse = grad_lse.data();
  backward.grad_out = problem.query;
  Numbers grad_query(size), grad_key(size), grad_value(size);
  Numbers grad_slot_key(size), grad_slot_value(size);
  backward.grad_query = grad_query.data();
  backward.grad_key = grad_key.data();
  backward.grad_value = grad_value.data();
  backward.grad_slot_key = grad_slot_key.data();
  backward.grad_slot_value = grad_slot_value.data();
  Numbers slot_sums(kHeads * 2 * problem.pattern.slots * kDim);
  backward.slot_sums = slot_sums.data();
  Numbers backward_memory(backward_scratch_bytes(problem) / 4);
  count("attention gradients", [&] {
    loops::attention_backward(backward, 0, backward_units(backward), backward_memory.data());
  });

  const MergeRows parts[2] = {{out.data(), lse.data(), kDim, 1},
                              {floats.data(), lse.data(), kDim, 1}};
  MergeProblem merge;
  merge.dim = kDim;
  merge.parts = 2;
  merge.part = parts;
  merge.merged = {grad_query.data(), grad_key.data(), kDim, 1};
  count("merged attention", [&] { loops::merge_attention_rows(merge, 0, kHeads * kRows); });
}

// kvcache
constexpr int64_t kBlocks = 8;
constexpr int64_t kBlockSize = 64;
constexpr int64_t kGroup = 4;

const int32_t kTable[kBlocks] = {3, 1, 7, 0, 2, 6, 4, 5};
const int32_t kLength = kBlocks * kBlockSize - 5;

PagedAttention decode(Numbers& query, void* pages, ElementType type, Numbers& out, Numbers& lse) {
  PagedAttention call{};
  call.type = type;
  call.query = query.data();
  call.key_pages = call.value_pages = pages;
  for (int64_t* stride : {call.key_stride, call.value_stride}) {
    stride[0] = kHeads * kBlockSize * kDim;
    stride[1] = kBlockSize * kDim;
    stride[2] = kDim;
  }
  call.query_stride[0] = kHeads * kGroup * kDim;
  call.query_stride[1] = call.query_stride[2] = kDim;
  call.block_table = kTable;
  call.table_stride = kBlocks;
  call.seq_lens = &kLength;
  call.queries = 1;
  call.group = kGroup;
  call.key_heads = kHeads;
  call.block_size = kBlockSize;
  call.head_dim = call.value_dim = kDim;
  call.causal = true;
  call.scale = 0.125;
  call.out = out.data();
  call.lse = lse.data();
  return call;
}

void kvcache() {
  const int64_t numbers = kBlocks * kHeads * kBlockSize * kDim;
  Numbers floats(numbers), halves(numbers, ElementType::kBFloat16);
  Numbers query(kHeads * kGroup * kDim), half_query(kHeads * kGroup * kDim, ElementType::kBFloat16);
  Numbers out(kHeads * kGroup * kDim), lse(kHeads * kGroup);
  const PagedAttentionTask task{0, 1, 0, kGroup, 0, kBlocks, -1};
  const auto run = [&](const char* name, const PagedAttention& call) {
    int64_t size = 0;
    loops::paged_attention_scratch(call, 1, kGroup, &size);
    Numbers scratch(size);
    count(name,
          [&] { loops::paged_attention_tasks(call, &task, 1, nullptr, scratch.data(), nullptr); });
  };
  run("decoding, float", decode(query, floats.data(), ElementType::kFloat, out, lse));
  run("decoding, bfloat16", decode(half_query, halves.data(), ElementType::kBFloat16, out, lse));

  std::vector<int8_t> codes(static_cast<size_t>(numbers));
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  std::vector<float> scales(kBlocks * kHeads, 0.01f);
  PagedAttention quantised = decode(query, codes.data(), ElementType::kFloat, out, lse);
  quantised.codes = CodeType::kInt8;
  quantised.key_scales = quantised.value_scales = scales.data();
  for (int64_t* stride : {quantised.key_scale_stride, quantised.value_scale_stride}) {
    stride[0] = kHeads;
    stride[1] = 1;
  }
  run("decoding, int8", quantised);

  Numbers summaries(256 * 2 * kDim), scores(256);
  count("block summary", [&] {
    loops::block_summary(floats.data(), ElementType::kFloat, kDim, kBlockSize, kDim, true,
                         summaries.data());
  });
  count("block scores", [&] {
    loops::block_scores(query.data(), ElementType::kFloat, kDim, kDim, kGroup, 1, kDim,
                        floats.data(), 2 * kDim, kDim, 256, scores.data());
  });

  SlotToken tokens[kBlockSize];
  for (int64_t t = 0; t < kBlockSize; ++t) tokens[t] = {t, t};
  const CodePages pages{
      CodeType::kInt8, codes.data(), {kHeads * kBlockSize * kDim, kBlockSize * kDim, kDim},
      scales.data(),   {kHeads, 1},  kBlockSize};
  const NewTokens from{ElementType::kFloat, floats.data(), {0, 0, kDim}, kDim};
  const BlockWrite write{0, 3, tokens, kBlockSize, true};
  count("quantised block", [&] { loops::quantise_block(pages, from, write, 0); });
}

}  // namespace

int main() {
  unmasking();
  resampling();
  attention();
  kvcache();
}
