"""Measurements of one engine to the laws' coefficients, with how far to trust them.

The csv file has one row per operating point of one (LLM, GPU, GPUs per instance). Of each line the first that is there:

    sequences in flight   batch | avg_batch_size | n_sequences                       required; of the whole instance
    decode step           step_s | step_ms | median_itl_ms | tok_per_s | decode_tok_per_s       required; tok_per_s is
                          of the whole instance and gives batch / tok_per_s, so it must not contain prefill
    context               context_tokens | sim_mean_output_position_tokens | context_window_tokens       optional
    power of one GPU      power_w_per_gpu | avg_power_per_gpu_w | power_w / (n_gpus | num_gpus | tp)      optional
    names                 llm | model_id, gpu | gpu_model, tp | n_gpus | num_gpus, precision | weight_precision, task

So our own files (batch, step_ms, context_tokens, power_w_per_gpu), the ML.ENERGY benchmark's table and a context sweep
are read as they are. Context is the mean length of a sequence in flight, prompt and output so far. ML.ENERGY's column
holds the output part only (its prompt lengths are not published): too short by the mean prompt. A sweep's window is
taken as full when a request ends: the context is the window, less half of `output_tokens_per_request` where given.
ML.ENERGY's step is the median inter-token latency, what a decode sees; its mean iteration includes prefill. Rows with
images or video (`flag_multimodal`) are left out.

`fit_decode` and `fit_power` minimise the relative error, because a step of 10 ms and one of 100 ms matter alike;
standard errors are those of least squares, from the residuals. The cost of a context token is fitted only where a batch
was measured at two contexts a factor 1.5 apart; else it is the one given. `documents.engine` writes what was fitted to
a file, and reads it back as an engine.
"""
