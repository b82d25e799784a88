import { Basket, Fruit, isKind, Kind } from './fruit';

type Totals = { [kind in Kind]?: number };

export class HarvestError extends Error {
  constructor(
    readonly line: number,
    problem: string,
  ) {
    super(`line ${line}: ${problem}`);
  }
}

export function parse(text: string): Basket {
  const basket = new Basket();
  text.split('\n').forEach((line, index) => {
    const [kind, grams, day] = line.split(/\s+/, 3);
    if (kind === undefined || kind === '') return;
    if (!isKind(kind)) throw new HarvestError(index + 1, `no fruit is called ${kind}`);
    const fruit: Fruit = { kind, grams: Number(grams ?? 0), picked: new Date(day ?? 0) };
    basket.add(fruit);
  });
  return basket;
}

export function totals(fruits: Iterable<Fruit>): Totals {
  const sums: Totals = {};
  for (const { kind, grams } of fruits) sums[kind] = (sums[kind] ?? 0) + grams;
  return sums;
}

export async function* heaviest(fruits: AsyncIterable<Fruit>, least: number): AsyncGenerator<Fruit, number> {
  let seen = 0;
  for await (const fruit of fruits) {
    seen++;
    if (fruit.grams >= least) yield fruit;
  }
  return seen;
}
