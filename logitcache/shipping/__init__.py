"""SHIPPING: a trained model leaves: exported as ONNX, quantised to int8, and used from the file alone."""
