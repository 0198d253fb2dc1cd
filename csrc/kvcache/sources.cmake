# Bookkeeping without torch, bound by csrc/python/bindings.cpp.
list(APPEND WINNOW_HOST_SOURCES
  csrc/kvcache/block_pool.cpp
  csrc/kvcache/cache_table.cpp
  csrc/kvcache/cache_table_prefix.cpp
  csrc/kvcache/prefix_index.cpp
)
list(APPEND WINNOW_CPU_SOURCES
  csrc/kvcache/attention_mass.cpp
  csrc/kvcache/block_scores.cpp
  csrc/kvcache/block_summaries.cpp
  csrc/kvcache/compact_pages.cpp
  csrc/kvcache/paged_attention.cpp
  csrc/kvcache/paged_quantise.cpp
  csrc/kvcache/paged_write.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/kvcache/attention_mass_simd.cc
  csrc/kvcache/block_scores_simd.cc
  csrc/kvcache/paged_attention_simd.cc
  csrc/kvcache/paged_quantise_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/kvcache/paged_attention.cu
  csrc/kvcache/attention_mass.cu
  csrc/kvcache/block_scores.cu
  csrc/kvcache/block_summaries.cu
  csrc/kvcache/paged_quantise.cu
  csrc/kvcache/paged_write.cu
)
