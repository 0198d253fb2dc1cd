list(APPEND WINNOW_CPU_SOURCES
  csrc/unmasking/logit_problem.cpp
  csrc/unmasking/logit_stats.cpp
  csrc/unmasking/logit_stats_double.cpp
  csrc/unmasking/measure_rows.cpp
  csrc/unmasking/merge_logit_stats.cpp
  csrc/unmasking/select_positions.cpp
  csrc/unmasking/soft_embedding.cpp
  csrc/unmasking/speculative_verify.cpp
  csrc/unmasking/unmask_step.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/unmasking/logit_stats_simd.cc
  csrc/unmasking/logit_truncation_simd.cc
  csrc/unmasking/soft_embedding_simd.cc
  csrc/unmasking/speculative_verify_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/unmasking/logit_stats.cu
  csrc/unmasking/merge_logit_stats.cu
  csrc/unmasking/soft_embedding.cu
  csrc/unmasking/speculative_verify.cu
  csrc/unmasking/unmask_step.cu
)
