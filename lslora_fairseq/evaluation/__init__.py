"""Test sets translated, scored and compared, all directions at once."""
