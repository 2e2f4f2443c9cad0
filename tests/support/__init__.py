"""What the distributed tests share: launches, engines, models, runs."""
