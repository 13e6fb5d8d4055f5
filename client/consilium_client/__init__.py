"""A hospital's site. Importing it asks MKL for reproducible products, before any module of it can load torch."""

from dpsgd.blas import set_blas_environment

set_blas_environment()
