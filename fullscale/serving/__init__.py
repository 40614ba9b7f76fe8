"""Use of trained models: lookup, input checks, output files, HTTP server, MLflow pyfunc, ONNX."""
