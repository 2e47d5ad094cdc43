"""Accuracy bounds that the documentation states and the tests enforce: one source for both.

ulp is the spacing of numbers just above 1 in the computing dtype: 2**-23 for float32, 2**-52 for
float64. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

#: Upper bound of the LAPACK test ratios |A - U S Vh| / (|A| max(m, n) ulp), |I - U^H U| / (m ulp)
#: and |I - V^H V| / (n ulp), in the 1-norm; for QR likewise |A - Q R| and |I - Q^H Q|. LAPACK's own
#: tests accept 50 (SVD) and 30 (QR).
ACC_RATIO: float = 5.0

#: Largest error of any singular value on the Jacobi routes, in ulp of the largest one.
ACC_SIGMA_ULP: float = 5.0

#: For A = B D with B well conditioned and D diagonal (down to 1e-12), the *relative* error of
#: every singular value on the Jacobi routes is below this many ulp, times n.
ACC_RELATIVE_SIGMA_ULP: float = 50.0

#: ``gradient="safe"`` drops 1 / (s_j - s_i) where the gap is at most this many eps of the largest
#: singular value; nearer than that, the two singular vectors are not determined by the matrix.
GRAD_GAP_EPS: float = 10.0

#: ``gemv``, with k terms a sum: |error| <= (ACC_GEMV_OUT_EPS eps + ACC_GEMV_SUM_EPS k eps32) scale
#: elementwise, where scale = |alpha| |op(a)| |x| + |beta y| + |bias|, eps is the spacing of numbers
#: just above 1 in the result's dtype and eps32 that in the dtype of the sums.
ACC_GEMV_OUT_EPS: float = 2.0
ACC_GEMV_SUM_EPS: float = 1.0

#: Truncated decompositions: the same for the gap between the last singular value kept and those
#: cut off, relative to the largest, where it is more than ``GRAD_GAP_EPS`` eps. What was cut off is
#: only known roughly.
GRAD_BOUNDARY_GAP: float = 1e-9

#: ``rsvd(..., return_error=True)`` is below the true ``|A - U S Vh|_2`` with at most this
#: probability, over the draw of its probes.
CERTIFICATE_FAILURE: float = 1e-4

#: ... and allows for this many ulp of the largest singular value of rounding in the probes.
CERTIFICATE_ULP: float = 4.0

#: ``|A - U S Vh|_2`` of ``rsvd`` with its default options is at most this many times the best
#: possible on spectra like exp(-i / 10) and 1 / i, as long as that is above rounding.
ACC_RSVD_OPTIMAL: float = 1.05

#: The leading half of its singular values are within this relative error there.
ACC_RSVD_SIGMA: float = 1e-4

#: ``lanczos_svd`` goes on until the residuals of its triplets, as its own recurrence has them, are
#: at most this many ulp of the largest singular value.
ACC_LANCZOS_ULP: float = 10.0
