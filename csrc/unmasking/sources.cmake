list(APPEND WINNOW_CPU_SOURCES
  csrc/unmasking/logit_stats.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/unmasking/logit_stats_simd.cc
)
