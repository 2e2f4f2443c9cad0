"""Files of safetensors: read slice by slice, written tensor by tensor."""
