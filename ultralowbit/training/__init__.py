"""What needs gradients: trainable views of packed weights, estimators of the sign, objectives, and the loop."""
