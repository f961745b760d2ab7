"""DeepSeek-V3/R1 and its MTP module, defined once for the quantizer and the engine."""
