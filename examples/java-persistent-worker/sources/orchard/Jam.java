package orchard;

/** A recipe that keeps long. */
@Recipe.Keeps(months = 24, where = {"cellar", "shelf"})
public class Jam extends Recipe {
  private final double sugarShare;

  public Jam(double sugarShare) {
    this.sugarShare = sugarShare;
  }

  @Override
  public Jam with(Fruit fruit, int amount) {
    super.with(fruit, (int) Math.round(amount * (1 - sugarShare)));
    return this;
  }

  @Override
  public int monthsItKeeps() {
    return sugarShare < 0.4 ? super.monthsItKeeps() / 4 : super.monthsItKeeps();
  }
}
