"""What the monitors share: when to measure, on which gradients, and where the numbers go."""
