# Sources of the attention family: list(APPEND WINNOW_CPU_SOURCES ...), list(APPEND WINNOW_SIMD_SOURCES ...)
