"""What a trained checkpoint tells about the next run: index sides, demand, ranks and modules."""
