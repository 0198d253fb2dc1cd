"""The ops inside models and pipelines of other libraries, one module per library.

Each needs its library installed: ``pip install 'torch-winnow[integrations]'``.
"""
