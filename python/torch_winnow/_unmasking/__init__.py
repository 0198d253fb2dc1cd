"""What :mod:`torch_winnow.unmasking` exports, one topic a module."""
