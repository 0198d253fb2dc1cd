list(APPEND WINNOW_CPU_SOURCES
  csrc/resampling/effective_sample_size.cpp
  csrc/resampling/gather_particles.cpp
  csrc/resampling/resample.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/resampling/effective_sample_size_simd.cc
  csrc/resampling/resample_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/resampling/effective_sample_size.cu
  csrc/resampling/gather_particles.cu
  csrc/resampling/resample.cu
)
