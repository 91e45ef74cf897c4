"""The Triton kernels. Imported only when the dispatch first chooses one."""
