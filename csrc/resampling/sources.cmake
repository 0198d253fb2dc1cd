list(APPEND WINNOW_CPU_SOURCES
  csrc/resampling/effective_sample_size.cpp
  csrc/resampling/gather_particles.cpp
  csrc/resampling/next_temperature.cpp
  csrc/resampling/resample.cpp
  csrc/resampling/sample_without_replacement.cpp
  csrc/resampling/trace_ancestors.cpp
  csrc/resampling/uniforms.cpp
  csrc/resampling/weight_statistics.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/resampling/effective_sample_size_simd.cc
  csrc/resampling/next_temperature_simd.cc
  csrc/resampling/resample_simd.cc
  csrc/resampling/sample_without_replacement_simd.cc
  csrc/resampling/weight_statistics_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/resampling/effective_sample_size.cu
  csrc/resampling/gather_particles.cu
  csrc/resampling/resample.cu
  csrc/resampling/next_temperature.cu
  csrc/resampling/sample_without_replacement.cu
  csrc/resampling/trace_ancestors.cu
  csrc/resampling/weight_statistics.cu
)
