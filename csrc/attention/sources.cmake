list(APPEND WINNOW_CPU_SOURCES
  csrc/attention/block_diagonal_attention.cpp
  csrc/attention/cat_attention.cpp
  csrc/attention/chunk_attention.cpp
  csrc/attention/merge_attention.cpp
  csrc/attention/run.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/attention/attention_backward_simd.cc
  csrc/attention/attention_forward_simd.cc
  csrc/attention/merge_attention_simd.cc
  csrc/attention/slot_gradients_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/attention/attention_backward.cu
  csrc/attention/run.cu
  csrc/attention/merge_attention.cu
)
