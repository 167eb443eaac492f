"""Models and bundles as onnxruntime runs them: sessions, subgraphs, precision, the bundle's folder.

Not here: how a bundle is made (`fedprune_export`). `session` is the only module that opens onnxruntime;
`session_process` has a child process do so.
"""
