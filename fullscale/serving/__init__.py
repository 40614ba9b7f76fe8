"""Models by name, input checks, outputs, HTTP, pyfunc and the check of an ONNX export."""
