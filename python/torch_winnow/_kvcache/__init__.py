"""What :mod:`torch_winnow.kvcache` exports, one topic a module."""
