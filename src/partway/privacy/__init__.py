"""What a tensor gives away, and what lessens it. Knows no party's role."""
