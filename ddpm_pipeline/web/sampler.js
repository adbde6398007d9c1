// SAMPLER: random numbers, samplers and interpolation, the same as in Python.

// ---- Random numbers: those of torch.randn with torch.Generator().manual_seed(seed) on a CPU ----

/** The Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). */
export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.position = 624;
  }

  /** 32 random bits. */
  bits() {
    const s = this.state;
    if (this.position === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.position = 0;
    }
    let y = s[this.position++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** N(0, 1), at least 16 numbers: Box and Muller (1958), from blocks of 16 uniform numbers. */
  normal(size) {
    const uniform = () => (this.bits() & 0xffffff) * 2 ** -24;
    const values = Float32Array.from({ length: size }, uniform);
    for (let start = 0; start + 16 <= size; start += 16) toNormal(values, start);
    if (size % 16) { // the last block overlaps the one before, and is drawn anew
      for (let i = size - 16; i < size; i++) values[i] = uniform();
      toNormal(values, size - 16);
    }
    return values;
  }
}

function toNormal(values, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
    const angle = 2 * Math.PI * values[i + 8];
    values[i] = radius * Math.cos(angle);
    values[i + 8] = radius * Math.sin(angle);
  }
}

// ---- Sampling ----

const HISTORY = 3; // predictions of x_0 that a step may use

/**
 * The image of a noise, by a sampler of page.json: x_0_pred = clip(p_x x_t + p_out output), then
 * x_prev = c_x x_t + c_0 x_0_pred + c_1 (that of the step before) + ... + noise.
 *
 * @param network (x_t, t) to a promise of its output
 * @param bound   of x_0_pred; null: it is not clipped
 * @param onStep  called with {t, x_t, x_0_pred} after each step
 */
export async function sample(network, sampler, bound, noise, generator, onStep) {
  let xT = noise;
  let predictions = []; // the newest first
  for (const { t, network_t, prediction, coefficients, noise: deviation } of sampler.steps) {
    const output = await network(xT, network_t);
    const [ofX, ofOutput] = prediction;
    const x0 = clipped(xT.map((x, i) => ofX * x + ofOutput * output[i]), bound);
    predictions = [x0, ...predictions].slice(0, HISTORY);
    const [coefX, ...coefs] = coefficients;
    const next = xT.map((x, i) => coefs.reduce((sum, coef, k) => sum + coef * predictions[k][i], coefX * x));
    if (deviation) generator.normal(next.length).forEach((value, i) => { next[i] += deviation * value; });
    onStep({ t, x_t: xT, x_0_pred: x0 });
    xT = next;
  }
  return clipped(xT, bound);
}

function clipped(values, bound) {
  return bound === null ? values : values.map((value) => Math.min(bound, Math.max(-bound, value)));
}

// ---- Interpolation ----

/** The point on the great circle between two noises; its norm is the weighted mean of theirs. */
export function slerp(a, b, weight) {
  if (weight === 0 || weight === 1) return weight ? b : a;
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const normA = Math.sqrt(dot(a, a)), normB = Math.sqrt(dot(b, b));
  const angle = Math.acos(Math.min(1, Math.max(-1, dot(a, b) / (normA * normB))));
  if (angle < 1e-6) return a; // the same noise
  const norm = ((1 - weight) * normA + weight * normB) / Math.sin(angle);
  const scaleA = norm * Math.sin((1 - weight) * angle) / normA, scaleB = norm * Math.sin(weight * angle) / normB;
  return a.map((value, i) => scaleA * value + scaleB * b[i]);
}
