"""Statistics of gradient noise: scale, tail index, tests of normality."""
