"""What a submodel costs: multiplications, bytes, time, memory."""
