"""A hospital's site. Importing it asks MKL for reproducible products, before any module of it can load torch."""

from consilium_client.blas import set_blas_environment

set_blas_environment()
