"""Per-sample gradients and DP-SGD for torch. Importing it asks MKL for reproducible products, before torch loads."""

from dpsgd.blas import set_blas_environment

set_blas_environment()
