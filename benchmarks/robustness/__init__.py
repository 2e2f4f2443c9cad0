"""What fine-tuning keeps of the pre-trained model, method beside method."""
