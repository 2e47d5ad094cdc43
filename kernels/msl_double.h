// What kernels/*.metal ask of the type that they compute in, for double, which Metal has not. Goes
// in front of a kernel's text for CUDA and for the simulator; see Real in kernels/svd.metal.
template <typename T>
struct Real;
template <>
struct Real<double> {
  typedef double type;
  typedef ulong bits;
  enum { kMantissa = 52, kBias = 1023, kSign = 63, kRoot = 512 };
  static double tiny() { return 1e-307; }
  static double vanished() { return 4.0039e-146; }  // 2^-483
};
template <>
struct Real<double2> : Real<double> {};
